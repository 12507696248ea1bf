"""Below a server dies what runs its sandboxes: box, container, engine. The server goes on and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chaos.server import Server
from tests.docker.engine_process import EngineProcess
from tests.docker.held_engine import HeldEngine
from tests.docker.points import (
    ENDED,
    ENDING,
    RUNNING,
    START,
    STARTING,
    STOPPING,
    nothing_is_left,
    reached,
    used,
)
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine

pytestmark = pytest.mark.docker

CREATED = {name: point for name, point in STARTING.items() if "create" not in name or "was" in name}
NOT_ITS_END = {"unknown", "outcome_unknown", "workspace_lost", "workspace_unavailable", "engine_unavailable"}
"""What is said of a command whose place has died: never an exit code."""


@pytest.fixture
async def held(tmp_path) -> AsyncIterator[HeldEngine]:
    async with HeldEngine(tmp_path) as held:
        yield held


@pytest.fixture
async def server(tmp_path, held, box_runtime) -> AsyncIterator[Server]:
    async with Server(tmp_path, engine=held.url, box_runtime=box_runtime) as server:
        assert await server.start()
        yield server


async def container_of(engine: Engine, server: Server) -> str:
    instance = (server.data / "instance").read_text().strip()
    (container,) = await engine.containers({labels.INSTANCE: instance})
    return container["Id"]


async def kill_box(engine: Engine, server: Server) -> None:
    """The child of the container's first process."""
    state = (await engine.inspect(await container_of(engine, server)))["State"]
    children = Path(f"/proc/{state['Pid']}/task/{state['Pid']}/children")
    for pid in children.read_text().split() or [state["Pid"]]:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


async def remove_container(engine: Engine, server: Server) -> None:
    await engine.remove(await container_of(engine, server))


async def went_on(engine: Engine, server: Server, use) -> None:
    """The command's end is not made up, the next one runs, and nothing is left of either place."""
    assert await use.outcome() in {ENDED, *NOT_ITS_END}
    await use.still_works()
    await use.delete()
    await nothing_is_left(engine, server)


@pytest.mark.parametrize("name", CREATED)
async def test_nothing_is_left_of_a_container_that_is_removed_by_somebody_else(engine, held, server, name):
    if CREATED[name] is not RUNNING:
        async with used(
            server
        ) as first:  # the first one of an image looks for its users, in a container of its own
            await first.outcome()
            await first.delete()
        held.hold(*CREATED[name])
    async with used(server) as use:
        await reached(CREATED[name], held, use)
        await remove_container(engine, server)
        held.release()
        await went_on(engine, server, use)


@pytest.mark.parametrize("point", [(*START, "answered"), RUNNING], ids=["it has started", "a command runs"])
async def test_nothing_is_left_of_a_box_that_is_killed(engine, held, server, point):
    if point is not RUNNING:
        held.hold(*point)
    async with used(server) as use:
        await reached(point, held, use)
        await kill_box(engine, server)
        held.release()
        await went_on(engine, server, use)


async def test_nothing_is_left_of_a_box_that_is_killed_while_it_does_nothing(engine, server):
    async with used(server) as use:
        assert await use.outcome() == ENDED
        await kill_box(engine, server)
        await went_on(engine, server, use)


async def test_nothing_is_left_of_a_box_that_is_killed_while_it_is_paused(engine, server):
    async with used(server) as use:
        assert await use.outcome() == ENDED
        await use.workspace.pause()
        await kill_box(engine, server)
        await went_on(engine, server, use)


@pytest.mark.parametrize(("kill", "point"), [(kill_box, STOPPING), (remove_container, ENDING)])
async def test_nothing_is_left_of_what_is_killed_while_it_is_ended(engine, held, server, kill, point):
    async with used(server) as use:
        assert await use.outcome() == ENDED
        held.hold(*point)
        deleting = asyncio.create_task(use.delete())
        await held.reached()
        await kill(engine, server)
        held.release()
        await deleting
    await nothing_is_left(engine, server)


@pytest.mark.parametrize("name", STARTING)
async def test_nothing_is_left_on_an_engine_that_is_killed(tmp_path, box_runtime, name):
    point = STARTING[name]
    async with EngineProcess() as process:
        held = HeldEngine(tmp_path, process.url.removeprefix("unix://"))
        async with held, Server(tmp_path, engine=held.url, box_runtime=box_runtime) as server:
            assert await server.start()
            if point is not RUNNING:
                held.hold(*point)
            async with used(server) as use:
                await reached(point, held, use)
                await process.kill()
                held.release()
                await process.start()
                async with Engine(process.url) as engine:
                    await went_on(engine, server, use)
