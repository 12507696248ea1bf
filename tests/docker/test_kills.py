"""Whoever is killed at whichever point: soon afterwards nothing is left that nobody owns."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.docker.held_engine import HeldEngine
from tests.docker.leaks import nothing_is_left_of
from tests.docker.servers import SERVER
from workspaces import labels

pytestmark = [pytest.mark.docker, pytest.mark.slow]

RUNNING = None
"""Not a call: a command runs."""
CREATE, START = ("POST", "/containers/create"), ("POST", "/containers/[^/]+/start")
POINTS = {
    "the container is about to be created": (*CREATE, "asked"),
    "the container was created": (*CREATE, "answered"),
    "the container is about to start": (*START, "asked"),
    "the container has started": (*START, "answered"),
    "a command runs": RUNNING,
}
SECONDS = 60


@pytest.fixture(params=POINTS)
def point(request):
    return POINTS[request.param]


@pytest.fixture
async def held(tmp_path) -> AsyncIterator[HeldEngine]:
    async with HeldEngine(tmp_path) as held:
        yield held


# --- the client of a server in a container ---

CLIENT = """
import asyncio, sys
from workspaces import DockerWorkspace
from workspaces.owner import this_process

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
