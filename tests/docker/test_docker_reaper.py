"""A client that is killed leaves no container behind, and one that is stopped with Ctrl-C neither."""

import asyncio
import os
import signal
import sys
import textwrap
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.docker.servers import SERVER, state
from workspaces import DockerWorkspace
from workspaces.backend import labels
from workspaces.backend.records import is_dead, this_process

pytestmark = pytest.mark.docker

ASYNC = """
    import asyncio, sys
    from workspaces import DockerWorkspace

    def on_progress(phase, done, total):
        print(phase, done, flush=True)

    async def main():
        async with DockerWorkspace(sys.argv[1], name=sys.argv[2], on_progress=on_progress) as workspace:
            print("entered", flush=True)
            await workspace.execute("sleep 600")

    asyncio.run(main())
"""
BLOCKING = """
    import sys
    from workspaces.sync import DockerWorkspace

    def on_progress(phase, done, total):
        print(phase, done, flush=True)

    with DockerWorkspace(sys.argv[1], name=sys.argv[2], on_progress=on_progress) as workspace:
        print("entered", flush=True)
        workspace.execute("sleep 600")
"""


@asynccontextmanager
async def client(program, name):
    """A program that starts a container of this name, as a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(program),
        SERVER,
        name,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until(process, line):
    async for said in process.stdout:
        if said.decode().strip() == line:
            return
    pytest.fail((await process.stderr.read()).decode())


@asynccontextmanager
async def removal(name):
    """Leaving waits until the engine has removed the container of this name, once it was made."""
    events = await asyncio.create_subprocess_exec(
        "docker",
        *("events", "--since", "1m", "--filter", f"container={name}", "--filter", "event=destroy"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield
        async with asyncio.timeout(60):
            await events.stdout.readline()
    finally:
        events.kill()
        await events.wait()


def reapers(instance):
    """The processes that watch over this instance."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = cmdline.read_bytes().split(b"\0")
            if b"workspaces.backend.docker.reaper" in words and instance.encode() in words:
                yield int(cmdline.parent.name)


async def ended(pid):
    over, loop = asyncio.Event(), asyncio.get_running_loop()
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        loop.add_reader(pidfd, over.set)
        async with asyncio.timeout(60):
            await over.wait()
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def instance_of(engine, name):
    return (await engine.inspect(name))["Config"]["Labels"][labels.INSTANCE]


@pytest.mark.parametrize("moment", ["start 0", "ready 0", "entered"])
@pytest.mark.parametrize("program", [ASYNC, BLOCKING], ids=["async", "blocking"])
async def test_a_client_that_is_killed_leaves_no_container(engine, free_name, program, moment):
    async with removal(free_name), client(program, free_name) as process:
        await until(process, moment)
        (reaper,) = reapers(await instance_of(engine, free_name))
        process.kill()
    await ended(reaper)


@pytest.mark.parametrize("moment", ["start 0", "entered"])
@pytest.mark.parametrize("program", [ASYNC, BLOCKING], ids=["async", "blocking"])
async def test_ctrl_c_removes_the_container_before_the_program_ends(engine, free_name, program, moment):
    async with client(program, free_name) as process:
        await until(process, moment)
        instance = await instance_of(engine, free_name)
        process.send_signal(signal.SIGINT)
        assert await process.wait() != 0
        assert await state(engine, free_name) is None
        assert not list(reapers(instance))
        assert b"KeyboardInterrupt" in await process.stderr.read()


async def test_one_that_is_to_be_kept_is_not_kept_when_its_client_is_killed_before_it_is_ready(
    engine, free_name
):
    async with removal(free_name), client(ASYNC.replace("name=", "keep=True, name="), free_name) as process:
        await until(process, "ready 0")
        (reaper,) = reapers(await instance_of(engine, free_name))
        process.kill()
    await ended(reaper)


async def test_no_reaper_stays_when_the_workspace_was_left(engine):
    async with DockerWorkspace(SERVER) as workspace:
        instance = await instance_of(engine, workspace.container)
        assert len(list(reapers(instance))) == 1
    assert not list(reapers(instance))


async def test_what_is_left_when_the_reaper_was_killed_too_goes_with_the_next_client(engine, free_name):
    async with client(ASYNC, free_name) as process:
        await until(process, "entered")
        (reaper,) = reapers(await instance_of(engine, free_name))
        os.kill(reaper, signal.SIGKILL)
        await ended(reaper)
        process.kill()
        await process.wait()
        assert await state(engine, free_name) == "running"
    async with DockerWorkspace(SERVER):
        assert await state(engine, free_name) is None


async def test_a_reaper_removes_nothing_of_others(engine, free_name):
    async with DockerWorkspace(SERVER) as other:
        async with removal(free_name), client(ASYNC, free_name) as process:
            await until(process, "start 0")
            (reaper,) = reapers(await instance_of(engine, free_name))
            process.kill()
        await ended(reaper)
        assert await state(engine, other.container) == "running"


def test_a_process_is_dead_when_its_number_belongs_to_another_one():
    me = this_process()
    machine, pid, ticks = me.split(".")
    assert not is_dead(me)
    assert is_dead(f"{machine}.{pid}.{int(ticks) - 1}")
    assert not is_dead(f"another-{machine}.{pid}.1")
    assert not is_dead("")
    assert not is_dead(f"{machine}.{'9' * 5000}.1")
