"""A server that runs in a container itself, and starts sandboxes beside it through the engine's socket."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from agent_sdk import Conversation, RemoteWorkspace, Sandbox
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable, WorkspaceUnavailable
from tests.docker.conftest import remove_all
from tests.docker.images import BUSYBOX
from tests.docker.servers import SERVER
from workspaces.backend import labels
from workspaces.backend.contract import KEY_NAME, Machine, Mount
from workspaces.backend.docker.backend import DockerBackend
from workspaces.server import Server

pytestmark = pytest.mark.docker


@asynccontextmanager
async def server(engine, instance, *volumes, data="/data"):
    socket = Mount("/var/run/docker.sock", "/var/run/docker.sock")
    machine = Machine(
        image=SERVER,
        name=f"agent-test-{new_id()}",
        mounts=(socket, *volumes),
        labels={labels.INSTANCE: instance},
        env={"AGENT_SERVER_BOXES_ON_STOP": "end", "AGENT_SERVER_DATA": data},
        secret_env={KEY_NAME: new_id()},
    )
    container = Server(DockerBackend(engine), machine)
    await container.start(120)
    try:
        yield container
    finally:
        await container.stop(grace=20)  # it ends its sandboxes, as it would for whoever stops it


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


async def content(engine, instance, volume):
    """What is in a volume, but for the box runtimes and the server's own files."""
    body = {
        "Image": BUSYBOX,
        "Cmd": ["find", "/data/workspaces", "/data/boxes", "/data/spools/workspaces", "-mindepth", "1"],
        "Labels": {labels.INSTANCE: instance},
        "HostConfig": {"NetworkMode": "none", "Binds": [f"{volume}:/data"]},
    }
    id = await engine.create(f"agent-test-{new_id()}", body)
    await engine.start(id)
    await engine.watch(id).died
    said = await engine.logs(id)
    await engine.remove(id)
    return said.split()


async def test_it_starts_sandboxes_beside_itself_and_removes_all_of_them(engine, instance, volume):
    async with server(engine, instance, Mount(volume, "/data")) as beside:
        async with sandbox(beside) as workspace:
            result = await workspace.execute(
                "echo works >file; cat file; mkdir -p a/b; touch a/b/c; chmod 0 a/b; id -u"
            )
            assert result.stdout == "works\n10001\n"
            info = await workspace.describe()
            assert (info.isolation, info.disk_quota) == ("runc", "none")
            (container,) = await engine.containers({labels.CONVERSATION: workspace.conversation})
            assert container["Id"] != beside.id
            assert await content(engine, instance, volume) != []
            async with Conversation(None, workspace, id=workspace.conversation) as conversation:
                await conversation.delete()
        assert await content(engine, instance, volume) == []
        async with sandbox(beside) as workspace:
            await workspace.execute("true")
    assert await remove_all(engine, container["Labels"][labels.INSTANCE]) == []


async def test_it_copies_what_belongs_to_the_user_of_sandboxes(engine, instance, volume):
    async with server(engine, instance, Mount(volume, "/data")) as beside:
        async with sandbox(beside) as workspace:
            await workspace.execute("mkdir -m 700 a; echo mine >a/b; chmod 600 a/b; ln -s /etc/passwd c")
            taken = await workspace.snapshot()
            assert 0 < taken.size < 1 << 20
            await workspace.execute("rm -r a")
        async with sandbox(beside, snapshot=taken.id) as workspace:
            result = await workspace.execute("cat a/b; readlink c; ls -l a | grep -c rw-------")
            assert result.stdout == "mine\n/etc/passwd\n1\n"


async def test_a_limit_of_the_disk_is_refused_with_the_reason(engine, instance, volume):
    async with server(engine, instance, Mount(volume, "/data")) as beside:
        with pytest.raises(IsolationUnavailable, match="disk: .* the server runs in a container"):
            async with sandbox(beside, disk="64m"):
                pass


async def test_without_a_volume_it_says_what_is_missing(engine, instance):
    spec_without = server(engine, instance, data="/srv")
    async with spec_without as beside, sandbox(beside) as workspace:
        with pytest.raises(WorkspaceUnavailable, match="/srv/.* is not on a volume .* mount a volume"):
            await workspace.execute("true")
