"""Whoever is killed at whichever point: soon afterwards nothing is left that nobody owns."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from agent_sdk.protocol.errors import AgentServerError
from tests.chaos.server import Server
from tests.docker.held_engine import HeldEngine
from tests.docker.leaks import nothing_is_left_of
from tests.docker.points import ENDED, ENDING, RUNNING, SECONDS, STARTING, nothing_is_left, reached, used
from tests.docker.servers import SERVER
from workspaces.backend import labels

pytestmark = pytest.mark.docker


@pytest.fixture(params=STARTING)
def point(request):
    return STARTING[request.param]


@pytest.fixture
async def held(tmp_path) -> AsyncIterator[HeldEngine]:
    async with HeldEngine(tmp_path) as held:
        yield held


# --- the client of a server in a container ---

CLIENT = """
import asyncio, sys
from workspaces import DockerWorkspace
from workspaces.backend.records import this_process

async def main(url, image):
    print(this_process(), flush=True)
    async with DockerWorkspace(image, docker_url=url) as workspace:
        await workspace.execute("echo begun; sleep 600", on_output=lambda *_: print("begun", flush=True))

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def client(url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, url, SERVER, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(SECONDS):
        return (await process.stdout.readline()).decode().strip()


async def test_nothing_is_left_of_a_client_that_is_killed(engine, held, point):
    if point is not RUNNING:
        held.hold(*point)
    async with client(held.url) as process:
        owner = await line_of(process)
        if point is RUNNING:
            assert await line_of(process) == "begun"
        else:
            await held.reached()
        process.kill()
        await process.wait()
        held.release()
        # The reaper of this client has the way to the engine on its command line.
        await nothing_is_left_of(engine, {labels.OWNER: owner}, held.url)


# --- a server with sandboxes ---


@pytest.fixture
async def server(tmp_path, held, box_runtime) -> AsyncIterator[Server]:
    async with Server(tmp_path, engine=held.url, box_runtime=box_runtime) as server:
        yield server


async def test_nothing_is_left_of_a_server_that_is_killed(engine, held, server, point):
    assert await server.start()
    if point is not RUNNING:
        held.hold(*point)
    async with used(server) as use:
        await reached(point, held, use)
        await server.kill()
        held.release()
        assert await server.start()
        outcome = await use.outcome()
        assert outcome == ENDED or (point is not RUNNING and outcome == "unknown")
        await use.still_works()
        await use.delete()
    await nothing_is_left(engine, server)


async def test_nothing_is_left_of_a_server_that_is_killed_while_it_removes_a_sandbox(engine, held, server):
    assert await server.start()
    async with used(server) as use:
        await use.outcome()
        held.hold(*ENDING)
        deleting = asyncio.create_task(use.delete())
        await held.reached()
        await server.kill()
        held.release()
        assert await server.start()
        with suppress(AgentServerError):  # it may be deleted already
            await deleting
    await nothing_is_left(engine, server)
