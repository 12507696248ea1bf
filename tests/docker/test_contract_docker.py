"""What workspaces and conversations promise holds on a server in a container of its own."""

from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from agent_sdk import Conversation, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.methods import Delete
from agent_sdk.remote.link import ask
from agent_sdk.remote.reconnecting import Target
from tests.contract.conversation import ConversationContract
from tests.contract.workspace import WorkspaceContract
from tests.docker.servers import SERVER
from workspaces.sync import DockerWorkspace

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def server(engine_is_there) -> Iterator[Target]:
    """One container for all; every workspace and conversation on it is fresh."""
    with DockerWorkspace(SERVER) as workspace:
        yield workspace.asynchronous.target


class TestInADockerWorkspace(WorkspaceContract):
    @pytest.fixture
    async def workspace(self, server):
        async with RemoteWorkspace(server.url, server.api_key) as workspace:
            yield workspace
            await ask(workspace.link, Delete(op_id=new_id()))


class TestOnADockerWorkspace(ConversationContract):
    @pytest.fixture
    async def open(self, server, places):
        async with AsyncExitStack() as stack:

            async def open(agent, **options):
                workspace = await stack.enter_async_context(RemoteWorkspace(server.url, server.api_key))
                conversation = Conversation(agent, workspace, **options)
                places[conversation] = workspace
                return conversation

            yield open
