"""An engine for the tests that need one, and the check that they leave nothing on it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import EngineUnavailable
from tests.docker import images
from tests.docker.boxes import sandboxes_in
from tests.docker.engine_process import EngineProcess
from tests.docker.networks import networks, remove_network
from tests.server.conftest import Running, Start
from tests.server.conftest import start as start
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine, engine_version
from workspaces.box.sandboxes import Sandboxes

Opened = Callable[..., AbstractAsyncContextManager[Sandboxes]]


@pytest.fixture(scope="session")
def engine_is_there() -> None:
    """Skips what needs an engine where there is none; with CONTAINERS_REQUIRED=1 that is a failure."""
    try:
        asyncio.run(engine_version())
        missing = [name for name in (images.FULL, images.BARE, images.BUSYBOX) if not images.is_there(name)]
        why = f"make them with `python -m tests.docker.images`: {', '.join(missing)}" if missing else ""
    except EngineUnavailable as exc:
        why = str(exc)
    if why and os.environ.get("CONTAINERS_REQUIRED"):
        pytest.fail(f"tests of containers are required here: {why}", pytrace=False)
    if why:
        pytest.skip(f"needs a container engine: {why}")


@pytest.fixture(autouse=True)
def needs_the_engine(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("docker"):
        request.getfixturevalue("engine_is_there")


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with Engine() as engine:
        yield engine


@pytest.fixture
async def instance(engine: Engine) -> AsyncIterator[str]:
    """An owner of containers, networks and volumes of which nothing may be left at the end of the test."""
    instance = new_id()
    yield instance
    left = await remove_all(engine, instance)
    assert not left, f"left behind on the engine: {left}"


async def remove_all(engine: Engine, instance: str) -> list[str]:
    """Remove what belongs to this owner, and name it."""
    mine = {labels.INSTANCE: instance}
    removed = []
    for container in await engine.containers(mine):
        removed.append(f"container {container['Names'][0]} ({container['State']})")
        await engine.remove(container["Id"])
    for network in await networks(mine):
        removed.append(f"network {network['Name']}")
        await remove_network(network["Id"])
    for volume in await engine.volumes(mine):
        removed.append(f"volume {volume['Name']}")
        await engine.remove_volume(volume["Name"])
    return removed


@pytest.fixture
async def free_name(engine: Engine) -> AsyncIterator[str]:
    """A name for a container; of none that has it anything may be left at the end of the test."""
    name = f"test-{new_id()}"
    yield name
    left = [container["Id"] for container in await engine.containers({}, name=name)]
    for id in left:
        await engine.remove(id)
    assert not left, f"left behind on the engine: the container {name}"


@pytest.fixture(scope="session")
def box_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of box runtimes for all servers of these tests: it takes seconds to make one."""
    return tmp_path_factory.getbasetemp().parent / "box-runtime"


@pytest.fixture
async def private_engine(request: pytest.FixtureRequest) -> AsyncIterator[EngineProcess]:
    """A second engine that may be killed; parametrize it with `live` or `mortal` containers (the default)."""
    async with EngineProcess(live_restore=getattr(request, "param", "mortal") == "live") as process:
        yield process


@pytest.fixture
async def opened(tmp_path: Path, engine: Engine, box_runtime: Path) -> AsyncIterator[Opened]:
    """Open the sandboxes of the data folder of this test; when it is over nothing of them is on the engine."""
    yield partial(sandboxes_in, tmp_path, box_runtime)
    left = await remove_all(engine, (tmp_path / "instance").read_text().strip())
    assert not left, f"left behind on the engine: {left}"


@pytest.fixture
def started(start: Start, box_runtime: Path) -> Start:
    """Start a server on the data folder of this test; see `server`."""

    @asynccontextmanager
    async def started(**options: Any) -> AsyncIterator[Running]:
        async with start(box_runtime=str(box_runtime), **options) as server:
            yield server

    return started


@pytest.fixture
async def server(started: Start, engine: Engine, tmp_path: Path) -> AsyncIterator[Running]:
    async with started() as server:
        yield server
    left = await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip())
    assert not left, f"left behind on the engine: {left}"
