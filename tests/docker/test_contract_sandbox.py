"""What workspaces and conversations promise holds in a sandbox that a server manages."""

import asyncio
from collections.abc import Iterator

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.methods.conversation import SetTitle
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.remote.link import ask
from tests.contract.conversation import ConversationContract
from tests.contract.files import FileContract
from tests.contract.repository import RepositoryContract
from tests.contract.transfers import TransferContract
from tests.contract.workspace import OpenWorkspaceContract
from tests.docker import images
from tests.docker.fresh import conversations, fresh

pytestmark = pytest.mark.docker

SANDBOX = Sandbox(image=images.FULL)
ABOUT_FILES = {contract.__name__ for contract in (FileContract, TransferContract, RepositoryContract)}
"""An empty folder is all that these need; the others look at processes and shells, too."""
EMPTY = "chmod -R u+rwx . && find . -mindepth 1 -delete"


def sandbox(server) -> RemoteWorkspace:
    return RemoteWorkspace(server.url, server.api_key, sandbox=SANDBOX)


@pytest.fixture(scope="module")
def shared(running_server, engine_is_there) -> Iterator[str]:
    """The conversation of a sandbox that many tests use, one after the other."""

    async def make() -> str:
        async with sandbox(running_server) as workspace:
            # What was only looked at would go when it is left.
            await ask(workspace.link, SetTitle(op_id=new_id(), title="shared"))
            return workspace.conversation

    async def delete() -> None:
        async with fresh(RemoteWorkspace(running_server.url, running_server.api_key, conversation=id)):
            pass

    id = asyncio.run(make())
    yield id
    asyncio.run(delete())


@pytest.mark.elsewhere
class TestInASandbox(OpenWorkspaceContract):
    @pytest.fixture
    async def workspace(self, request, running_server, shared):
        if request.function.__qualname__.split(".")[0] in ABOUT_FILES:
            url, key = running_server.url, running_server.api_key
            async with RemoteWorkspace(url, key, conversation=shared) as workspace:
                assert (await workspace.execute(EMPTY)).exit_code == 0
                yield workspace
        else:
            async with fresh(sandbox(running_server)) as workspace:
                yield workspace


@pytest.mark.elsewhere
class TestOnAServerWithSandboxes(ConversationContract):
    @pytest.fixture
    async def open(self, running_server, places):
        async with conversations(places, lambda: sandbox(running_server)) as open:
            yield open
