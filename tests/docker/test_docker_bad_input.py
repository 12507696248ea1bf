"""What cannot be started says which phase failed, why, and what to do; and nothing is left of it."""

import socket
import subprocess

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    ConnectionLost,
    EngineUnavailable,
    ImageUnavailable,
    InvalidParams,
    PathNotFound,
    PolicyDenied,
    WorkspaceUnavailable,
)
from tests.docker.images import BUSYBOX, FULL
from tests.docker.servers import SERVER, state
from workspaces import DockerWorkspace

pytestmark = pytest.mark.docker


async def refused(error, **options):
    """The sentence with which the start fails."""
    image = options.pop("server_image", SERVER)
    with pytest.raises(error) as raised:
        async with DockerWorkspace(image, **options):
            pytest.fail("it was entered")
    return raised.value


@pytest.fixture
def image_that_does(request):
    """An image of a program that is no server."""
    name = f"agent-test/does:{new_id()}"
    text = f"FROM {BUSYBOX}\nCMD {request.param}\n"
    subprocess.run(["docker", "build", "--quiet", "-t", name, "-"], input=text.encode(), check=True)
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], check=True, capture_output=True)


WRONG = {
    "no size": ({"memory": "much"}, "memory: 'much' is no size; write a number and a unit, like 512m"),
    "little memory": ({"memory": "32m"}, "memory: 32m is too small; give it 64m or more"),
    "no cpus": ({"cpus": 0}, "cpus: 0 must be between 0.01 and 1024"),
    "few pids": ({"pids": 1}, "pids: 1 must be between 32 and 4194304"),
    "no name": ({"name": "a b"}, "name: 'a b' is no name of a container"),
    "kept under no name": ({"keep": True, "name": ""}, "keep: a container that is kept needs a name"),
    "no port": ({"host_port": 70_000}, "host_port: expected a port from 1 to 65535 or None, got 70000"),
    "no volume": ({"volumes": ["/tmp"]}, "volumes: '/tmp' must look like /host/folder:/folder"),
    "odd mode": ({"volumes": ["/tmp:/in:rx"]}, "volumes: '/tmp:/in:rx' must look like /host/folder:/folder"),
    "relative": ({"volumes": ["./in:/in"]}, "volumes: './in' is neither an absolute path nor the name"),
    "odd variable": ({"env": {"A=B": "x"}}, "env: 'A=B' is no name of a variable"),
    "no gpu": ({"gpus": " "}, "gpus: expected `all`, a number, or ids separated by commas"),
    "two places": ({"conversation": "a", "working_dir": "/"}, "conversation: it has its workspace already"),
}


@pytest.mark.parametrize(("options", "sentence"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused_before_anything_is_asked(options, sentence):
    with pytest.raises(InvalidParams) as raised:
        DockerWorkspace(SERVER, **options)
    assert str(raised.value).startswith(sentence)


def test_variables_of_the_server_are_not_for_commands():
    with pytest.raises(PolicyDenied, match="AGENT_SERVER_PORT"):
        DockerWorkspace(SERVER, env={"AGENT_SERVER_PORT": "1"})


async def test_without_an_engine_it_says_how_to_get_one(tmp_path):
    error = await refused(EngineUnavailable, docker_url=f"unix://{tmp_path}/docker.sock")
    assert (
        str(error) == f"there is no engine at unix://{tmp_path}/docker.sock: start Docker, or set DOCKER_HOST"
    )
    assert error.details["phase"] == "engine"


async def test_a_port_that_is_taken_is_told_and_nothing_is_left(engine, free_name):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = await refused(WorkspaceUnavailable, name=free_name, host_port=port)
    assert "address already in use" in str(error)
    assert "let the engine choose one" in str(error)
    assert error.details["phase"] == "start"
    assert await state(engine, free_name) is None


async def test_a_network_that_does_not_exist_is_told_and_nothing_is_left(engine, free_name):
    error = await refused(WorkspaceUnavailable, name=free_name, network="no-such-network")
    assert "no-such-network not found; make the network, or correct its name" in str(error)
    assert await state(engine, free_name) is None


@pytest.mark.parametrize("network", ["host", "none", "container:x"])
async def test_a_network_in_which_nobody_else_is_kept_out_is_refused(network):
    assert f"network: {network} cannot be used" in str(await refused(InvalidParams, network=network))


async def test_a_volume_that_does_not_exist_is_not_made(engine, free_name):
    error = await refused(InvalidParams, name=free_name, volumes=[f"{free_name}:/in"])
    assert str(error) == (
        f"volumes: there is no volume {free_name}; make it: docker volume create {free_name}"
    )
    assert free_name not in {volume["Name"] for volume in await engine.volumes({})}


async def test_a_folder_that_does_not_exist_is_not_made(tmp_path):
    error = await refused(PathNotFound, volumes=[f"{tmp_path}/missing:/in"])
    assert str(error) == f"volumes: no such folder: {tmp_path}/missing; make it first"
    assert not (tmp_path / "missing").exists()


async def test_our_own_image_is_never_asked_for_at_a_registry():
    error = await refused(ImageUnavailable, server_image="agent-server:never-made")
    assert str(error).endswith("make it: make image")
    assert error.details["phase"] == "image"


async def test_an_image_without_a_server_is_told_at_once_with_its_last_words(engine, free_name):
    error = await refused(WorkspaceUnavailable, server_image=FULL, name=free_name)
    assert f"the server in {FULL} ended: it ended with exit code 0" in str(error)
    assert await state(engine, free_name) is None


@pytest.mark.parametrize("image_that_does", ["echo too bad; exit 3"], indirect=True)
async def test_a_server_that_dies_at_its_start_is_told_with_its_last_words(image_that_does):
    error = await refused(WorkspaceUnavailable, server_image=image_that_does)
    assert str(error).endswith("it ended with exit code 3; it said: too bad")
    assert error.details["phase"] == "ready"


@pytest.mark.parametrize(
    "image_that_does",
    [r"""echo -n '{"x":'; yes '[' | tr -d '\n' | head -c 60000; echo; echo too bad; exit 3"""],
    indirect=True,
)
async def test_a_line_of_a_server_that_nobody_could_read_keeps_no_others_back(image_that_does):
    lines = []
    await refused(WorkspaceUnavailable, server_image=image_that_does, on_log=lines.append)
    assert (lines[0][:8], lines[1]) == ('{"x":[[[', "too bad")


@pytest.mark.parametrize("image_that_does", ["echo hm; sleep 600"], indirect=True)
async def test_one_that_never_becomes_ready_ends_with_the_time_for_its_start(
    engine, image_that_does, free_name
):
    error = await refused(
        WorkspaceUnavailable, server_image=image_that_does, name=free_name, startup_timeout=6
    )
    assert "was not ready in time (phase ready); it said: hm; give it more with startup_timeout" in str(error)
    assert error.details["phase"] == "ready"
    assert await state(engine, free_name) is None


READY = """echo '{"url":"","api_key_file":null,"pid":1}'"""


@pytest.mark.parametrize("image_that_does", [f"{READY}; echo and out; exit 4"], indirect=True)
async def test_a_server_that_dies_as_soon_as_it_is_ready_is_told_with_its_last_words(image_that_does):
    error = await refused(WorkspaceUnavailable, server_image=image_that_does)
    assert "it ended with exit code 4" in str(error)
    assert "and out" in str(error)


@pytest.mark.parametrize("image_that_does", [f"{READY}; sleep 600"], indirect=True)
async def test_one_that_says_it_is_ready_and_does_not_listen_ends_with_the_time_for_its_start(
    engine, image_that_does, free_name
):
    options = {"name": free_name, "startup_timeout": 2}
    await refused((WorkspaceUnavailable, ConnectionLost), server_image=image_that_does, **options)
    assert await state(engine, free_name) is None
