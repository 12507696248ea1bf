"""The contract of a workspace holds over every kind of connection."""

import os
from contextlib import AsyncExitStack

import pytest

from agent_sdk import LocalWorkspace, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ConnectionLost, InvalidParams, Unauthorized
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.remote.link import Fixed, ask
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.workspace.service import workspace_handlers
from bench.measure import rss_mib
from tests.contract.workspace import WorkspaceContract
from workspaces.box.process import BoxProcess


class TestOverMemory(WorkspaceContract):
    @pytest.fixture
    async def workspace(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        here, there = memory_pipes()
        async with AsyncExitStack() as stack:
            local = await stack.enter_async_context(LocalWorkspace(root))
            handlers = workspace_handlers(local)
            await stack.enter_async_context(Peer(there, handlers, opener=False, strict=True))
            peer = await stack.enter_async_context(Peer(here, opener=True))
            yield RemoteWorkspace.over(Fixed(peer))


@pytest.mark.elsewhere
class TestOverAUnixSocketToABox(WorkspaceContract):
    @pytest.fixture
    async def workspace(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        async with (
            BoxProcess(root, tmp_path / "box", environment=environment) as box,
            RemoteWorkspace(box.url, box.token) as workspace,
        ):
            yield workspace


class TestOverAWebSocketThroughAServer(WorkspaceContract):
    @pytest.fixture
    async def workspace(self, running_server):
        async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
            yield workspace
            await ask(workspace.link, Delete(op_id=new_id()))  # its box would live as long as the server


async def test_a_wrong_key_is_refused_with_a_permission_error(running_server):
    with pytest.raises(Unauthorized, match="API key") as caught:
        async with RemoteWorkspace(running_server.url, "wrong"):
            pass
    assert isinstance(caught.value, PermissionError)


async def test_a_server_that_is_not_there_is_a_connection_error(unused_tcp_port):
    with pytest.raises(ConnectionLost, match="Connection refused; is the server running there"):
        async with RemoteWorkspace(f"http://127.0.0.1:{unused_tcp_port}", "key", connect_timeout=0.2):
            pass


async def test_a_url_without_a_scheme_is_refused_with_one_sentence():
    with pytest.raises(InvalidParams, match="must start with http"):
        async with RemoteWorkspace("localhost:8000", "key"):
            pass


async def test_a_workspace_that_is_not_entered_says_so():
    with pytest.raises(ConnectionLost, match="async with"):
        await RemoteWorkspace("http://127.0.0.1:1", "key").execute("true")


async def test_an_idle_box_is_small(tmp_path):
    async with (
        BoxProcess(tmp_path, tmp_path / "box") as box,
        RemoteWorkspace(box.url, box.token) as workspace,
    ):
        await workspace.describe()
        assert rss_mib(box.pid) <= 27
