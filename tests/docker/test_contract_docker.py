"""What workspaces and conversations promise holds on a server in a container of its own."""

from collections.abc import Iterator

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.remote.reconnecting import Target
from tests.contract.conversation import ConversationContract
from tests.contract.workspace import OpenWorkspaceContract
from tests.docker.fresh import conversations, fresh
from tests.docker.servers import SERVER
from workspaces.sync import DockerWorkspace

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def server(engine_is_there) -> Iterator[Target]:
    """One container for all; every workspace and conversation on it is fresh."""
    with DockerWorkspace(SERVER) as workspace:
        yield workspace.asynchronous.target


@pytest.mark.elsewhere
class TestInADockerWorkspace(OpenWorkspaceContract):
    @pytest.fixture
    async def workspace(self, server):
        async with fresh(RemoteWorkspace(server.url, server.api_key)) as workspace:
            yield workspace


@pytest.mark.elsewhere
class TestOnADockerWorkspace(ConversationContract):
    @pytest.fixture
    async def open(self, server, places):
        async with conversations(places, lambda: RemoteWorkspace(server.url, server.api_key)) as open:
            yield open
