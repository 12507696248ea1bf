"""What a container is given: folders, variables, networks, ports; and engines that are reached in other ways."""

import asyncio
import os
import socket
from contextlib import asynccontextmanager

import aiohttp
import pytest

from agent_sdk.ids import new_id
from tests.docker.networks import make_network, networks, remove_network
from tests.docker.servers import SERVER
from workspaces import DockerWorkspace
from workspaces.backend import labels

pytestmark = pytest.mark.docker

USER = 12_345


@pytest.fixture
def folder(tmp_path):
    """A folder of somebody who is not root."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "task.txt").write_text("do it\n")
    os.chown(folder, USER, USER)
    return folder


@pytest.fixture
async def network(engine, instance):
    name = f"agent-test-{new_id()}"
    await make_network(name, {labels.INSTANCE: instance})
    yield name
    await remove_network(name)


# --- folders and variables ---


async def test_what_commands_write_in_a_folder_belongs_to_its_owner(folder):
    async with DockerWorkspace(SERVER, volumes=[f"{folder}:/project"]) as workspace:
        result = await workspace.execute(
            "id -u; cat task.txt; echo done > done.txt; mkdir out", cwd="/project"
        )
        assert (result.stdout, result.stderr) == (f"{USER}\ndo it\n", "")
        assert await workspace.files.read("/project/done.txt") == b"done\n"
        await workspace.files.write("own.txt", b"the workspace is theirs, too")
    for made in (folder / "done.txt", folder / "out"):
        assert made.stat().st_uid == USER
    assert (folder / "done.txt").read_text() == "done\n"


async def test_of_a_folder_that_belongs_to_root_it_is_told_that_commands_may_not_write_there(
    tmp_path, caplog
):
    async with DockerWorkspace(SERVER, volumes=[f"{tmp_path}:/project"]) as workspace:
        assert (await workspace.execute("id -u")).stdout == "10001\n"
    assert f"volumes: {tmp_path} belongs to user 0, as whom commands cannot run" in caplog.text


async def test_a_folder_that_is_read_only_stays_as_it_is(folder):
    async with DockerWorkspace(SERVER, volumes=[f"{folder}:/project:ro"]) as workspace:
        result = await workspace.execute("id -u; touch /project/new")
        assert result.stdout == "10001\n"
        assert "Read-only file system" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["task.txt"]


async def test_a_named_volume_outlives_the_container(engine, instance):
    name = f"agent-test-{new_id()}"
    await engine.create_volume(name, {"Labels": {labels.INSTANCE: instance}})
    async with DockerWorkspace(SERVER, volumes=[f"{name}:/workspace/kept"]) as workspace:
        assert (await workspace.execute("ls kept")).exit_code == 0
    (volume,) = await engine.volumes({labels.INSTANCE: instance})
    assert volume["Name"] == name
    await engine.remove_volume(name)


async def test_variables_reach_commands_and_not_the_server(monkeypatch):
    monkeypatch.setenv("FORWARDED", "from here")
    monkeypatch.setenv("LLM_API_KEY", "forwarded on purpose")
    given = {"GREETING": "hello", "PYTHONHOME": "/nowhere"}
    names = ("FORWARDED", "LLM_API_KEY", "NOT_SET_HERE")
    async with DockerWorkspace(SERVER, env=given, forward_env=names) as workspace:
        seen = (await workspace.execute("env")).stdout.splitlines()
    wanted = {
        "GREETING=hello",
        "PYTHONHOME=/nowhere",
        "FORWARDED=from here",
        "LLM_API_KEY=forwarded on purpose",
    }
    assert wanted < set(seen)
    assert not [
        line for line in seen if line.startswith(("NOT_SET", "AGENT_SERVER_API", "AGENT_SERVER_COMMAND"))
    ]


# --- networks and ports ---


async def test_it_joins_the_network_that_is_named(engine, network):
    async with DockerWorkspace(SERVER, network=network) as workspace:
        settings = (await engine.inspect(workspace.container))["NetworkSettings"]
        assert list(settings["Networks"]) == [network]
        assert (await workspace.execute("true")).exit_code == 0


async def test_the_port_may_be_chosen():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with DockerWorkspace(SERVER, host_port=port) as workspace:
        assert workspace.target.url == f"http://127.0.0.1:{port}"


async def test_further_ports_are_published_on_this_machine(engine):
    async with DockerWorkspace(SERVER, ports=[9000]) as workspace:
        await workspace.execute("echo hello from in here > index.html")
        server = await workspace.start("exec python3 -um http.server 9000 2>&1")
        async for said in server.output():
            if b"Serving" in said:
                break
        url = await workspace.port_url(9000)
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert await answer.text() == "hello from in here\n"
        (published,) = (await engine.inspect(workspace.container))["NetworkSettings"]["Ports"]["9000/tcp"]
        assert published["HostIp"] == "127.0.0.1"


# --- other ways to the engine ---


@asynccontextmanager
async def forwarded(address):
    """The engine's socket, as a port of this machine: what DOCKER_HOST=tcp://… leads to."""

    async def pump(reader, writer):
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def passed_on(reader, writer):
        there = await asyncio.open_unix_connection("/var/run/docker.sock")
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    server = await asyncio.start_server(passed_on, address, 0)
    try:
        yield f"tcp://{address}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.fixture(params=["loopback", "network"])
async def address(request, engine):
    """An address of this machine; the second one that every machine with an engine has is that of a bridge."""
    if request.param == "loopback":
        return "127.0.0.1"
    (bridge,) = [network for network in await networks({}) if network["Name"] == "bridge"]
    return bridge["IPAM"]["Config"][0].get("Gateway") or "172.17.0.1"


async def test_an_engine_of_another_machine_publishes_where_it_is_reached_itself(engine, address):
    async with forwarded(address) as url, DockerWorkspace(SERVER, docker_url=url) as workspace:
        (published,) = (await engine.inspect(workspace.container))["NetworkSettings"]["Ports"]["8000/tcp"]
        assert published["HostIp"] == address
        assert workspace.target.url == f"http://{address}:{published['HostPort']}"
        assert (await workspace.execute("echo reached")).stdout == "reached\n"


async def test_docker_host_names_the_engine(monkeypatch):
    async with forwarded("127.0.0.1") as url:
        monkeypatch.setenv("DOCKER_HOST", url)
        async with DockerWorkspace(SERVER) as workspace:
            assert (await workspace.execute("echo reached")).stdout == "reached\n"


INSIDE = """
import asyncio, sys
from workspaces import DockerWorkspace

async def main():
    async with DockerWorkspace(sys.argv[1], network=sys.argv[2] or None) as workspace:
        print(workspace.target.url, (await workspace.execute("echo reached")).stdout)

asyncio.run(main())
"""


async def run_inside(engine, instance, **host):
    """Run a client in a container that has the engine's socket, and return what it said."""
    body = {
        "Image": SERVER,
        "Entrypoint": ["/opt/agent-server/bin/python", "-c", INSIDE],
        "Cmd": [SERVER, host.pop("wanted", "")],
        "Labels": {labels.INSTANCE: instance},
        "HostConfig": {"Binds": ["/var/run/docker.sock:/var/run/docker.sock"], **host},
    }
    id = await engine.create(f"test-{new_id()}", body)
    await engine.start(id)
    try:
        return "\n".join([line async for line in engine.follow_logs(id)])
    finally:
        await engine.remove(id)


async def test_a_client_in_a_container_joins_the_server_in_its_network(engine, instance, network):
    said = await run_inside(engine, instance, NetworkMode=network)
    (subnet,) = [found["IPAM"]["Config"] for found in await networks({}) if found["Name"] == network]
    assert said.startswith(f"http://{subnet[0]['Gateway'].rpartition('.')[0]}.")
    assert said.split()[-1] == "reached"
    assert ":8000 " in said


async def test_a_client_in_a_container_is_told_when_it_is_not_in_the_network(engine, instance, network):
    said = await run_inside(engine, instance, wanted=network)
    assert f"which is not in the network {network}; connect it: docker network connect {network}" in said


async def test_a_client_in_the_network_of_the_machine_uses_its_loopback(engine, instance):
    said = await run_inside(engine, instance, NetworkMode="host")
    assert said.startswith("http://127.0.0.1:")
    assert said.split()[-1] == "reached"
