"""The Runtime API with containers behind it."""

import pytest

from agent_sdk.protocol.errors import RemoteApiError
from agent_server.runtime_config import RuntimeConfig
from tests.docker.conftest import remove_all
from tests.docker.servers import SERVER, state
from tests.server.conftest import start  # noqa: F401  a server in this process
from tests.server.test_runtime_api import ALICE, TENANTS, client
from workspaces import APIRemoteWorkspace

pytestmark = pytest.mark.docker


@pytest.fixture
async def server(start, engine, tmp_path):  # noqa: F811
    runtimes = RuntimeConfig(tenants=TENANTS, unit_memory=256 << 20, unit_cpus=0.5)
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


async def test_a_paused_runtime_is_frozen_and_goes_on_where_it_was(there, engine):
    async with there() as workspace:
        await workspace.execute("echo kept > file")
        await workspace.pause()
        assert await state(engine, container(workspace)) == "paused"
        await workspace.resume()
        assert (await workspace.execute("cat file")).stdout == "kept\n"


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
