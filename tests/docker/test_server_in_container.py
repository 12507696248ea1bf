"""A server that runs in a container itself, and starts sandboxes beside it through the engine's socket."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from agent_sdk import RemoteWorkspace, Sandbox
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable, WorkspaceUnavailable
from tests.docker.conftest import remove_all
from tests.docker.images import BUSYBOX
from tests.docker.servers import SERVER
from workspaces import labels
from workspaces.server_container import ServerContainer
from workspaces.server_spec import ServerSpec, Volume

pytestmark = pytest.mark.docker


@asynccontextmanager
async def server(engine, instance, *volumes):
    socket = Volume("/var/run/docker.sock", "/var/run/docker.sock")
    spec = ServerSpec(
        image=SERVER,
        name=f"agent-test-{new_id()}",
        volumes=(socket, *volumes),
        labels={labels.INSTANCE: instance},
        env={"AGENT_SERVER_BOXES_ON_STOP": "end"},
    )
    container = ServerContainer(engine, spec)
    await container.start()
    try:
        yield container
    finally:
        print(await container.last_words())
        await container.stop()


@asynccontextmanager
async def sandbox(server, **wanted):
    wanted = Sandbox(image=BUSYBOX, **wanted)
    async with RemoteWorkspace(server.url, server.api_key, sandbox=wanted) as workspace:
        yield workspace


@pytest.fixture
async def volume(engine, instance):
    name = f"agent-test-{new_id()}"
    await engine.create_volume(name, {"Labels": {labels.INSTANCE: instance}})
    yield name
    await engine.remove_volume(name)


async def test_it_starts_sandboxes_beside_itself(engine, instance, volume):
    async with server(engine, instance, Volume(volume, "/data")) as beside:
        async with sandbox(beside) as workspace:
            result = await workspace.execute("echo works >file; cat file; mkdir -p a/b; touch a/b/c; chmod 0 a/b; id -u")
            assert result.stdout == "works\n10001\n"
            info = await workspace.describe()
            assert (info.isolation, info.disk_quota) == ("runc", "none")
            (container,) = await engine.containers({labels.CONVERSATION: workspace.conversation})
            assert container["Id"] != beside.id
        left = container["Labels"][labels.INSTANCE]
    assert await remove_all(engine, left) == []
