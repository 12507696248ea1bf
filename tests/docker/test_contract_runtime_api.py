"""What workspaces and conversations promise holds on a runtime that a Runtime API has started."""

import json
import urllib.request
from collections.abc import Iterator

import pytest

from agent_sdk import RemoteWorkspace
from tests.conftest import serving
from tests.contract.conversation import ConversationContract
from tests.contract.workspace import WorkspaceContract
from tests.docker.fresh import conversations, fresh
from tests.docker.servers import SERVER

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def runtime(tmp_path_factory, engine_is_there) -> Iterator[dict[str, str]]:
    with serving(tmp_path_factory.mktemp("api"), AGENT_SERVER_RUNTIME_API="process") as server:
        body = json.dumps({"image": SERVER, "session_id": "one"}).encode()
        headers = {"X-API-Key": server.api_key, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/start?wait=60", body, headers)
        with urllib.request.urlopen(request) as answer:
            yield json.load(answer)


class TestInARuntime(WorkspaceContract):
    @pytest.fixture
    async def workspace(self, runtime):
        async with fresh(RemoteWorkspace(runtime["url"], runtime["session_api_key"])) as workspace:
            yield workspace


class TestOnARuntime(ConversationContract):
    @pytest.fixture
    async def open(self, runtime, places):
        def make():
            return RemoteWorkspace(runtime["url"], runtime["session_api_key"])

        async with conversations(places, make) as open:
            yield open
