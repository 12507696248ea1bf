"""The Runtime API with containers behind it."""

import asyncio
import json
import os
import shlex
import shutil

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import RemoteApiError
from agent_server.config.options import RuntimeConfig, TenantConfig
from tests.chaos.server import KEY, Server
from tests.docker import images
from tests.docker.conftest import remove_all
from tests.docker.held_engine import HeldEngine
from tests.docker.servers import SERVER, state
from tests.docker.test_sandbox_images import image as image
from tests.server.conftest import start  # noqa: F401  a server in this process
from tests.server.test_runtime_api import ALICE, BOB, TENANTS, client
from tests.test_examples import run
from workspaces import APIRemoteWorkspace
from workspaces.backend import labels

pytestmark = pytest.mark.docker

POINTS = [
    ("/volumes/create", "answered"),
    ("/containers/create", "asked"),
    ("/containers/create", "answered"),
    ("/start", "asked"),
    ("/start", "answered"),
]
"""Calls of the engine, and whether it has done them when the server dies."""


@pytest.fixture
def disk(request):
    """Bytes of the data of a runtime; 0: it is a volume of the engine."""
    return getattr(request, "param", 64 << 20)


@pytest.fixture
async def server(start, engine, tmp_path, disk):  # noqa: F811
    bob = TenantConfig(key=BOB, memory=256 << 20)
    runtimes = RuntimeConfig(
        tenants={**TENANTS, "bob": bob},
        images=("*",),
        unit_memory=256 << 20,
        unit_cpus=0.5,
        unit_disk=disk,
    )
    async with start(runtime_api="docker", runtimes=runtimes) as server:
        yield server
    instance = (tmp_path / "data" / "runtimes" / "instance").read_text().strip()
    left = await remove_all(engine, instance)
    assert not left, f"left behind on the engine: {left}"


@pytest.fixture
def there(server):
    return lambda **more: APIRemoteWorkspace(server.url, ALICE, SERVER, **more)


def container(workspace):
    return f"agent-server-{workspace.runtime_id}"


async def test_a_runtime_is_a_container_of_its_own_within_its_limits(there, engine):
    async with there(resource_factor=2) as workspace:
        assert (await workspace.execute("id -u")).stdout == "10001\n"
        limits = (await engine.inspect(container(workspace)))["HostConfig"]
        assert (limits["Memory"], limits["NanoCpus"]) == (512 << 20, 1e9)
    assert await state(engine, container(workspace)) is None


async def test_the_data_of_a_runtime_is_limited_and_survives_its_container(server, engine, tmp_path):
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("limits take root and e2fsprogs")
    async with client(server) as api:
        shown = await api.start(image=SERVER, resource_factor=2)
        assert shown["disk"] == 128 << 20
        async with RemoteWorkspace(shown["url"], shown["session_api_key"]) as workspace:
            full = await workspace.execute(
                "head -c 200M /dev/zero > much; rm much; df --output=size -B1M . | tail -1; echo kept > file"
            )
            assert "No space left" in full.stderr
            assert int(full.stdout) <= 128
            await engine.kill(f"agent-server-{shown['runtime_id']}")  # and started again
            assert (await workspace.execute("cat file")).stdout == "kept\n"
        await api.verb("stop", shown)
        assert not list((tmp_path / "data" / "runtime-disks" / "disks").iterdir())


async def test_no_sweep_takes_what_a_runtime_has_stored_under_a_former_name(start, engine, tmp_path):  # noqa: F811
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("limits take root and e2fsprogs")
    runtimes = RuntimeConfig(tenants=TENANTS, images=("*",), unit_memory=256 << 20, unit_disk=64 << 20)
    options = {"runtime_api": "docker", "runtimes": runtimes}
    disks = tmp_path / "data" / "runtime-disks" / "disks"
    async with start(**options) as server, client(server) as api:
        made = await api.start(image=SERVER)
        async with RemoteWorkspace(made["url"], made["session_api_key"]) as workspace:
            await workspace.execute("echo kept > file")
            conversation = workspace.conversation
        await api.verb("pause", made)
    await engine.remove(f"agent-server-{made['runtime_id']}")
    (disks / f"agent-server-{made['runtime_id']}.img").rename(disks / f"{made['runtime_id']}.img")
    async with start(**options) as server, client(server) as api:
        made = await api.start(image=SERVER)
        again = RemoteWorkspace(made["url"], made["session_api_key"], conversation=conversation)
        async with again as workspace:
            assert (await workspace.execute("cat file")).stdout == "kept\n"
        await api.verb("stop", made)
        assert not list(disks.iterdir())


async def test_a_paused_runtime_is_frozen_and_goes_on_where_it_was(there, engine):
    async with there() as workspace:
        await workspace.execute("echo kept > file")
        await workspace.pause()
        assert await state(engine, container(workspace)) == "paused"
        await workspace.resume()
        assert (await workspace.execute("cat file")).stdout == "kept\n"


async def test_a_paused_container_counts_with_its_memory_until_it_is_stopped(server):
    async with client(server, BOB) as api:
        first = await api.start("one", image=SERVER)
        await api.verb("pause", first)
        assert "bytes of memory" in (await api.start("two", status=429, image=SERVER))["error"]["message"]
        assert (await api.verb("resume", first))["status"] == "running"
        await api.verb("stop", first)


async def test_a_container_that_dies_is_started_again_with_its_files(there, engine, server):
    async with there() as workspace:
        await workspace.execute("echo kept > file")
        await engine.kill(container(workspace))
        assert (await workspace.execute("cat file")).stdout == "kept\n"
        async with client(server) as api:
            shown = await api.session(workspace.session_id)
        assert (shown["restart_count"], len(shown["restart_reasons"])) == (1, 1)


async def test_variables_reach_the_commands_and_not_the_server(there):
    async with there(env={"COLOUR": "blue"}) as workspace:
        assert (await workspace.execute("echo $COLOUR")).stdout == "blue\n"


async def test_an_image_that_is_not_there_is_one_error_with_its_name(server):
    with pytest.raises(RemoteApiError, match="nowhere/nothing:1"):
        async with APIRemoteWorkspace(
            server.url, ALICE, "nowhere/nothing:1", image_pull_policy="Never", startup_timeout=30
        ):
            pass
    async with client(server) as api:
        assert (await api.ask("GET", "/list"))["runtimes"] == []


async def test_an_image_without_a_server_is_an_error_with_its_last_words(server):
    with pytest.raises(RemoteApiError, match="the runtime did not start"):
        async with APIRemoteWorkspace(
            server.url, ALICE, "agent-test/busybox:1", image_pull_policy="Never", startup_timeout=30
        ):
            pass


async def test_a_class_that_the_engine_does_not_have_is_an_error(there):
    with pytest.raises(RemoteApiError, match="kata-runtime"):
        async with there(runtime_class="kata"):
            pass


FOREIGN = """
import http.server, json, os, sys
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = {"path": self.path, "key": self.headers.get("X-Session-API-Key"), "env": dict(os.environ)}
        data = os.stat("/data")
        found["data"] = [data.st_gid, data.st_mode & 0o2770, os.path.exists("/data/old")]
        open("/data/made", "a").close()
        found["made"] = [os.stat("/data/" + name).st_gid for name in os.listdir("/data") if name != "lost+found"]
        found |= {"cwd": os.getcwd(), "user": os.getuid(), "groups": os.getgroups()}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("0.0.0.0", int(sys.argv[2])), Server).serve_forever()
"""


@pytest.mark.parametrize("disk", [0, 64 << 20], indirect=True)
async def test_a_server_of_somebody_else_runs_as_its_starter_says(server, image, disk):
    """As the clients of other servers ask for them, which know nothing of ours."""
    filled = image("RUN mkdir /data && echo x >/data/old && chmod 700 /data", base=images.FULL)
    async with client(server) as api:
        command = f"python3 -c {shlex.quote(FOREIGN)} --port 60000"
        more = {"working_dir": "/usr", "run_as_user": 10003, "fs_group": 10004}
        runtime = await api.start(image=filled, command=command, environment={"COLOUR": "blue"}, **more)
        assert runtime["pod_status"] == "ready", runtime
        headers = {"X-Session-API-Key": runtime["session_api_key"]}
        async with api.http.get(f"{runtime['url']}/api/bash", headers=headers) as answer:
            found = json.loads(await answer.read())
        assert (found["path"], found["cwd"], found["user"]) == ("/api/bash", "/usr", 10003)
        assert found["data"] == [
            10004,
            0o2770,
            disk == 0,
        ]  # what an image has there is in volumes of the engine
        assert set(found["made"]) == {10004}
        assert (found["key"], 10004 in found["groups"]) == (runtime["session_api_key"], True)
        assert {found["env"][name] for name in ("SESSION_API_KEY", "OH_SESSION_API_KEYS_0")} == {
            runtime["session_api_key"]
        }
        assert found["env"]["COLOUR"] == "blue"
        await api.verb("pause", runtime)
        resumed = await api.verb("resume", runtime)
        await api.session(wait=30)
        async with api.http.get(f"{resumed['url']}/again", headers=headers) as answer:
            assert json.loads(await answer.read())["path"] == "/again"
        await api.verb("stop", runtime)


async def test_a_server_of_somebody_else_that_ends_at_once_is_an_error_with_its_last_words(server):
    async with client(server) as api:
        runtime = await api.start(image=images.FULL, command=["sh", "-c", "echo no; exit 3"])
        assert (runtime["status"], runtime["pod_status"]) == ("error", "failed")
        (event,) = runtime["events"]
        assert event.endswith("; it said: no")
        await api.verb("stop", runtime)


async def test_what_a_killed_start_has_left_is_swept_up_and_nothing_else(start, engine, tmp_path, instance):  # noqa: F811
    mine = tmp_path / "data" / "runtimes" / "instance"
    mine.parent.parent.mkdir(mode=0o700)
    mine.parent.mkdir()
    mine.write_text(instance)
    body = {"Image": SERVER, "Labels": {labels.INSTANCE: instance}}
    left = await engine.create(f"agent-server-{new_id()}", body)
    await engine.create_volume(f"agent-server-{new_id()}-data", {"Labels": {labels.INSTANCE: instance}})
    foreign = await engine.create(f"test-{new_id()}", {"Image": SERVER})
    try:
        async with start(
            runtime_api="docker", runtimes=RuntimeConfig(tenants=TENANTS, images=("*",))
        ) as server:
            await server.log.until("leftover_removed", 2)
            async with client(server) as api:
                await api.ask("GET", "/list")
        assert await state(engine, left) is None
        assert await engine.volumes({labels.INSTANCE: instance}) == []
        assert await state(engine, foreign) == "created"
    finally:
        await engine.remove(foreign)


async def test_the_example_runs_against_containers(server, tmp_path):
    environ = {"API_URL": server.url, "API_KEY": ALICE, "API_IMAGE": SERVER}
    here, there = await asyncio.gather(
        asyncio.to_thread(run, "01_here.py", EXAMPLE_DIR=str(tmp_path)),
        asyncio.to_thread(run, "05_runtime_api.py", **environ),
    )
    assert there == here


# --- killed ---


@pytest.fixture
async def killable(engine, tmp_path):
    """A server as a process of its own."""
    limits = {"runtime_api_unit_memory": 256 << 20, "runtime_api_images": "*", "runtime_api_unit_disk": 0}
    async with Server(tmp_path, runtime_api="docker", **limits) as server:
        assert await server.start()
        server.url = f"http://127.0.0.1:{server.port}"
        server.instance = (tmp_path / "data" / "runtimes" / "instance").read_text().strip
        yield server
    instance = (tmp_path / "data" / "runtimes" / "instance").read_text().strip()
    left = await remove_all(engine, instance)
    assert not left, f"left behind on the engine: {left}"


@pytest.fixture
async def held(tmp_path):
    async with HeldEngine(tmp_path) as held:
        yield held


async def test_a_runtime_goes_on_when_the_runtime_api_is_killed_and_is_found_again(killable, engine):
    async with APIRemoteWorkspace(killable.url, KEY, SERVER) as workspace:
        going_on = await workspace.start("echo begun; read line; echo $line")
        before = (await engine.inspect(container(workspace)))["State"]
        await killable.restart()
        await going_on.write(b"still here\n")
        assert b"".join([piece async for piece in going_on.output()]) == b"begun\nstill here\n"
        assert (await engine.inspect(container(workspace)))["State"] == before


@pytest.mark.parametrize(("path", "when"), POINTS)
async def test_a_start_that_was_killed_is_finished_by_the_next_server(killable, engine, held, path, when):
    await killable.kill()
    assert await killable.start(DOCKER_HOST=held.url)
    held.hold("POST", path, when)
    async with client(killable, KEY) as api:
        runtime = await api.ask("POST", "/start", json={"image": SERVER, "session_id": "one"})
        await held.reached()
        await killable.restart()
        held.release()
        found = await api.session(wait=60)
        assert (found["runtime_id"], found["pod_status"]) == (runtime["runtime_id"], "ready"), found[
            "pod_logs"
        ]
        mine = {labels.INSTANCE: killable.instance()}
        assert [each["State"] for each in await engine.containers(mine)] == ["running"]
        await api.verb("stop", runtime)
        assert await engine.containers(mine) == await engine.volumes(mine) == []


async def test_a_runtime_that_died_while_the_engine_was_away_comes_back_with_it(killable, engine, tmp_path):
    await killable.kill()
    async with HeldEngine(tmp_path) as way:
        assert await killable.start(DOCKER_HOST=way.url)
        async with client(killable, KEY) as api:
            runtime = await api.start(image=SERVER)
    (tmp_path / "held.sock").unlink()
    await engine.kill(f"agent-server-{runtime['runtime_id']}")
    async with HeldEngine(tmp_path), client(killable, KEY) as api:
        await killable.said("runtime_died")
        found = await api.session(wait=60)
        assert (found["pod_status"], found["restart_count"]) == ("ready", 1)
        await api.verb("stop", runtime)


async def test_the_engine_removes_a_container_and_its_runtime_comes_back_with_its_files(killable, engine):
    async with APIRemoteWorkspace(killable.url, KEY, SERVER) as workspace:
        await workspace.execute("echo kept > file")
        await engine.remove(container(workspace))
        assert (await workspace.execute("cat file")).stdout == "kept\n"
