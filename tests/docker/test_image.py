"""The image of a server: what it is, how it starts and ends, and what commands in it cannot reach."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import aiodocker
import pytest

from agent_sdk import LLM, Agent, Conversation, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.remote.reconnecting import Target
from tests.docker import images
from tests.docker.fresh import fresh
from tests.docker.servers import SERVER
from tests.server.wire import GUARD
from workspaces.backend import labels
from workspaces.backend.contract import KEY_NAME, SERVER_PORT, Machine
from workspaces.backend.docker.engine import Engine
from workspaces.backend.docker.profiles import server_body
from workspaces.sync import DockerWorkspace

pytestmark = pytest.mark.docker

MOST_BYTES = 200 << 20
"""Above its base."""
BASE = os.environ.get("SERVER_IMAGE_BASE", images.FULL)
MODEL_KEY = f"sk-{secrets.token_hex(16)}"
SERVER_USER, BOX_USER = 10_000, 10_001

Started = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture(scope="module")
def server(engine_is_there) -> Iterator[Target]:
    """One container for all that only look."""
    with DockerWorkspace(SERVER) as workspace:
        yield workspace.asynchronous.target


@pytest.fixture
async def workspace(server) -> AsyncIterator[RemoteWorkspace]:
    async with fresh(RemoteWorkspace(server.url, server.api_key)) as workspace:
        yield workspace


@pytest.fixture
async def container(engine: Engine, instance: str) -> AsyncIterator[Started]:
    """Start a container of the image, which differs from what we start by these fields; gives its id."""

    @asynccontextmanager
    async def started(env: Mapping[str, str] = {}, **fields: Any) -> AsyncIterator[str]:
        name = f"agent-server-{new_id()}"
        machine = Machine(
            image=SERVER,
            name=name,
            env=env,
            secret_env={KEY_NAME: secrets.token_hex(16)},
            labels={labels.INSTANCE: instance},
        )
        body = server_body(machine, storage=None, bind="127.0.0.1", network=None)
        body["HostConfig"] |= fields.pop("HostConfig", {})
        id = await engine.create(name, body | fields)
        try:
            await engine.start(id)
            yield id
        finally:
            await engine.remove(id)

    yield started


async def ready(engine: Engine, id: str) -> str:
    """Wait until the server in it is, and return its address."""
    async for line in engine.follow_logs(id):
        if line.startswith('{"url"'):
            ports = (await engine.inspect(id))["NetworkSettings"]["Ports"]
            return f"http://127.0.0.1:{ports[f'{SERVER_PORT}/tcp'][0]['HostPort']}"
    raise AssertionError(await engine.logs(id))


async def key_of(engine: Engine, id: str) -> str:
    env = (await engine.inspect(id))["Config"]["Env"]
    return next(text.partition("=")[2] for text in env if text.startswith("AGENT_SERVER_API_KEY="))


async def config_of(image: str) -> dict[str, Any]:
    async with aiodocker.Docker() as docker:
        return (await docker.images.inspect(image))["Config"]


async def exit_of(engine: Engine, id: str) -> int | None:
    watch = engine.watch(id)
    try:
        async with asyncio.timeout(GUARD):
            return (await watch.died).exit_code
    finally:
        watch.close()


async def test_it_says_what_it_is_and_how_to_use_it():
    config = await config_of(SERVER)
    assert config["Labels"]["org.opencontainers.image.title"] == "agent-server"
    assert {"version", "revision", "licenses"} <= {name.rpartition(".")[2] for name in config["Labels"]}
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert list(config["Volumes"]) == ["/data"]
    assert "/health" in str(config["Healthcheck"]["Test"])
    assert not any("KEY" in variable for variable in config["Env"])


async def test_it_is_little_larger_than_its_base(engine):
    image, base = await engine.image(SERVER, pull="never"), await engine.image(BASE, pull="never")
    assert image.size - base.size <= MOST_BYTES


async def test_git_and_bash_are_in_it(workspace):
    assert (await workspace.execute("git init -q . && git status --short --branch")).exit_code == 0


async def test_commands_find_the_python_of_the_base(workspace):
    assert (await workspace.execute("command -v python3")).stdout in (
        "/usr/bin/python3\n",
        "/usr/local/bin/python3\n",
    )
    assert (await workspace.execute("agent-server --version")).exit_code == 0


async def test_commands_are_another_user_than_the_server_and_have_no_privileges(workspace):
    status = (await workspace.execute("cat /proc/self/status")).stdout
    found = dict(line.split(":", 1) for line in status.splitlines())
    assert found["Uid"].split() == found["Gid"].split() == [str(BOX_USER)] * 4
    assert {int(value, 16) for name, value in found.items() if name.startswith("Cap")} == {0}
    assert (found["NoNewPrivs"].strip(), found["Seccomp_filters"].strip()) == ("1", "2")
    owners = (await workspace.execute("stat -c %u /proc/1")).stdout
    assert (await workspace.describe()).isolation == "user"
    assert owners.strip() in (str(SERVER_USER), "0")  # of a process that is kept from others it is 0


ATTACH = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(0 if libc.ptrace(16, int(sys.argv[1]), 0, 0) == 0 else ctypes.get_errno() or 1)
"""


@pytest.mark.parametrize(
    "attempt",
    [
        "tr '\\0' '\\n' </proc/{pid}/environ",
        ": </proc/{pid}/mem",
        "grep . /proc/{pid}/maps",
        "ls /proc/{pid}/fd/",
        "ls /proc/{pid}/cwd/",
        "ls /proc/{pid}/root/",
        "cat /proc/{pid}/syscall",
        "kill -0 {pid}",
        "kill -9 {pid}",
        "kill -STOP {pid}",
        "python3 -c '{attach}' {pid}",
        "ls /data",
        "ls /data/workspaces",
        "ls /data/boxes",
        "cat /data/log.db",
        "cat /data/lock",
        "ls /home/agent-server",
        "touch /opt/agent-server/bin/planted",
        "touch /opt/agent-server/lib/planted",
        "touch /data/planted",
        "rm -r /data/workspaces",
        "su -c true",
        "unshare --user true",
        "setpriv --reuid 10000 true",
    ],
)
async def test_commands_do_not_reach_the_server(workspace, attempt):
    servers = (await workspace.execute("pgrep -u agent-server")).stdout.split()
    assert servers
    for pid in servers:
        tried = attempt.format(pid=pid, attach=ATTACH)
        assert (await workspace.execute(tried)).exit_code not in (0, None), tried
    assert (await workspace.execute("true")).exit_code == 0


async def test_no_command_finds_a_key_of_the_server_or_of_a_model(server, workspace):
    agent = Agent(
        llm=LLM(model="openai/some", api_key=MODEL_KEY, base_url="http://127.0.0.1:9/v1", retries=0)
    )
    async with Conversation(agent, workspace) as conversation:
        await conversation.send_message("Whatever.")
        for key in (server.api_key, MODEL_KEY):
            search = f"grep -rsl '[{key[0]}]{key[1:]}' /data /home /tmp /run /var /workspace /etc /opt/agent-server/bin"
            everywhere = "/proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/task/*/environ"
            assert (await workspace.execute(f"{search} {everywhere}")).stdout == ""


async def test_no_key_is_on_a_command_line_or_in_the_log(engine, container):
    async with container() as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with RemoteWorkspace(url, key) as workspace:
            shown = (await workspace.execute("ps axww -o args")).stdout
            assert "agent-server serve" in shown
        assert key not in shown
        assert key not in await engine.logs(id, lines=1000)


@pytest.mark.parametrize("port", [SERVER_PORT, 9000])
@pytest.mark.parametrize("user", [None, "4000"])
async def test_it_becomes_healthy_on_whatever_port_it_listens(engine, container, port, user):
    soon = {"Test": (await config_of(SERVER))["Healthcheck"]["Test"]}
    soon |= {"Interval": 200_000_000, "Timeout": 5_000_000_000, "StartPeriod": 60_000_000_000}
    given = {"User": user} if user else {}
    async with container(Healthcheck=soon, Cmd=["serve", "--port", str(port), "--json"], **given) as id:
        async with asyncio.timeout(GUARD):
            while (await engine.inspect(id))["State"]["Health"]["Status"] != "healthy":  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # the engine tells no one


async def test_a_data_folder_that_its_health_check_could_not_find_is_refused(engine, container):
    async with container(Cmd=["serve", "--data", "/elsewhere"]) as id:
        assert await exit_of(engine, id) == 2
        assert "AGENT_SERVER_DATA" in await engine.logs(id)


async def test_term_ends_it_within_the_drain(engine, container):
    async with container(env={"AGENT_SERVER_DRAIN_SECONDS": "1"}) as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with RemoteWorkspace(url, key) as workspace:
            await workspace.start(["sleep", "600"])
            await engine.stop(id, 25)
        assert (await engine.inspect(id))["State"]["ExitCode"] == 0
        assert "server_stopped" in await engine.logs(id)


@pytest.mark.parametrize("user", ["10001", "12345:0"])
async def test_as_one_user_it_starts_and_says_that_commands_are_not_kept_apart(engine, container, user):
    async with container(User=user, HostConfig={"CapAdd": []}) as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with fresh(RemoteWorkspace(url, key)) as workspace:
            assert (await workspace.describe()).isolation == "none"
            assert (await workspace.execute("id -u")).stdout.strip() == user.partition(":")[0]
        said = await engine.logs(id)
        assert (
            f"start: the container runs as user {user.partition(':')[0]}: commands run as the server does"
            in said
        )
        assert "what the server keeps goes with the container" in said


async def test_as_one_user_the_isolation_that_is_asked_for_is_given_or_refused(engine, container):
    async with container(
        env={"AGENT_SERVER_ISOLATION": "user"}, User="10001", HostConfig={"CapAdd": []}
    ) as id:
        assert await exit_of(engine, id) == 2
        assert "isolation=user is not available" in await engine.logs(id)


async def test_as_root_without_capabilities_it_says_which_it_needs(engine, container):
    async with container(HostConfig={"CapAdd": []}) as id:
        assert await exit_of(engine, id) == 2
        assert "start: as root it needs the capabilities CHOWN, KILL, SETGID" in await engine.logs(id)


async def test_its_root_may_be_read_only(engine, container):
    async with container(HostConfig={"ReadonlyRootfs": True, "Tmpfs": {"/tmp": "", "/home/agent": ""}}) as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with fresh(RemoteWorkspace(url, key)) as workspace:
            assert (await workspace.execute("echo hello | tee file")).stdout == "hello\n"


async def test_its_key_may_be_in_a_file_that_only_root_reads(engine, container, tmp_path):
    key = secrets.token_hex(16)
    (tmp_path / "key").write_text(key + "\n")
    (tmp_path / "key").chmod(0o600)
    mount = {"Type": "bind", "Source": str(tmp_path / "key"), "Target": "/run/secrets/key", "ReadOnly": True}
    given = {"Env": ["AGENT_SERVER_API_KEY_FILE=/run/secrets/key"], "HostConfig": {"Mounts": [mount]}}
    async with container(**given) as id, fresh(RemoteWorkspace(await ready(engine, id), key)) as workspace:
        assert (await workspace.execute("cat /run/secrets/key; env")).stdout.count(key) == 0
    (tmp_path / "key").chmod(0o644)
    async with container(**given) as id:
        assert await exit_of(engine, id) == 2
        assert "start: commands could read /run/secrets/key: chmod 600 it" in await engine.logs(id)


async def test_commands_may_be_the_user_to_whom_a_folder_of_the_host_belongs(engine, container, tmp_path):
    os.chown(tmp_path, 12345, 12345)
    mount = {"Type": "bind", "Source": str(tmp_path), "Target": "/workspace"}
    async with container(env={"AGENT_SERVER_BOX_USER": "12345"}, HostConfig={"Mounts": [mount]}) as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with fresh(RemoteWorkspace(url, key, working_dir="/workspace")) as workspace:
            assert (await workspace.execute("id -u; echo hello >file")).stdout.strip() == "12345"
    assert (tmp_path / "file").stat().st_uid == 12345


async def test_the_data_outlives_the_container(engine, container, instance):
    name = f"test-{instance}"
    await engine.create_volume(name, {"Labels": {labels.INSTANCE: instance}})
    mount = {"HostConfig": {"Mounts": [{"Type": "volume", "Source": name, "Target": "/data"}]}}
    async with container(**mount) as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with RemoteWorkspace(url, key) as workspace:
            await workspace.execute("echo hello >file")
            conversation = workspace.conversation
    async with container(**mount) as id:
        url, key = await ready(engine, id), await key_of(engine, id)
        async with RemoteWorkspace(url, key, conversation=conversation) as workspace:
            assert (await workspace.execute("cat file")).stdout == "hello\n"
    await engine.remove_volume(name)
