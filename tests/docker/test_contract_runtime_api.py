"""What workspaces and conversations promise holds on a runtime that a Runtime API has started."""

from collections.abc import Iterator

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.remote.reconnecting import Target
from tests.conftest import serving
from tests.contract.conversation import ConversationContract
from tests.contract.workspace import OpenWorkspaceContract
from tests.docker.fresh import conversations, fresh
from tests.docker.servers import SERVER
from workspaces.sync import APIRemoteWorkspace

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def runtime(tmp_path_factory, engine_is_there) -> Iterator[Target]:
    """One runtime for all; every workspace and conversation on it is fresh."""
    folder = tmp_path_factory.mktemp("api")
    with (
        serving(folder, AGENT_SERVER_RUNTIME_API="docker", AGENT_SERVER_RUNTIME_API_IMAGES="*") as server,
        APIRemoteWorkspace(server.url, server.api_key, SERVER) as workspace,
    ):
        yield workspace.asynchronous.target


@pytest.mark.elsewhere
class TestInARuntime(OpenWorkspaceContract):
    @pytest.fixture
    async def workspace(self, runtime):
        async with fresh(RemoteWorkspace(runtime.url, runtime.api_key)) as workspace:
            yield workspace


@pytest.mark.elsewhere
class TestOnARuntime(ConversationContract):
    @pytest.fixture
    async def open(self, runtime, places):
        def make():
            return RemoteWorkspace(runtime.url, runtime.api_key)

        async with conversations(places, make) as open:
            yield open
