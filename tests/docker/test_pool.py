"""Boxes that wait for an owner: taken by those who ask for their kind, replaced, and never left behind."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_sdk import RemoteWorkspace, Sandbox
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, ImageUnavailable
from tests.docker.boxes import box, containers, said
from tests.docker.held_engine import HeldEngine
from tests.docker.images import BUSYBOX, FULL
from tests.docker.leaks import nothing_is_left_of
from workspaces.backend import labels
from workspaces.box.sandboxes import NOBODY

pytestmark = pytest.mark.docker


async def waiting(engine, sandboxes):
    found = await containers(engine, sandboxes)
    return {each["Id"] for each in found if each["Labels"][labels.CONVERSATION].startswith(NOBODY)}


async def test_who_asks_for_their_kind_gets_a_box_that_runs_already_and_another_one_takes_its_place(
    opened, engine
):
    async with opened(pool={BUSYBOX: 1}) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        (first,) = await waiting(engine, sandboxes)
        async with box(sandboxes, env={"WHOSE": "mine"}) as taken:
            assert (
                await said(taken, "echo $WHOSE; pwd; echo kept >kept; cat kept") == "mine\n/workspace\nkept\n"
            )
            await sandboxes.told.times(2, "box_waits")
            now = {each["Id"] for each in await containers(engine, sandboxes)}
            assert first in now
            assert len(now) == 2
            assert sandboxes.recorded("one").instance == taken.instance
        assert first not in {each["Id"] for each in await containers(engine, sandboxes)}
        async with box(sandboxes) as again:  # from the beginning: its workspace is there
            assert await said(again, "cat kept; echo $WHOSE") == "kept\n\n"
            assert len(await containers(engine, sandboxes, "one")) == 1


async def test_an_image_that_cannot_be_had_keeps_no_other_from_waiting(opened):
    async with opened(pool={"no..image": 1, BUSYBOX: 1}) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        assert ("box_waits", {"image": BUSYBOX}) in sandboxes.told.events
        assert sandboxes.told.events.count(("box_waits", {"image": BUSYBOX})) == 1
        await sandboxes.told.times(1, "pool_not_filled")


async def test_nothing_of_nobody_is_remembered_of_a_box_that_has_an_owner(opened):
    async with opened(pool={BUSYBOX: 1}) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        (first,) = sandboxes.host.disks.owners()
        async with box(sandboxes):
            remembered = [disks._turns for disks in (sandboxes.host.disks, sandboxes.host._spools)]
            assert all(first not in owners for owners in remembered)


@pytest.mark.parametrize(
    "wanted", [{"memory": "64m"}, {"pids": 32}, {"cpus": 0.5}, {"pull": "always"}, {"disk": "64m"}], ids=str
)
async def test_who_wants_something_else_gets_a_box_of_their_own(opened, engine, wanted):
    async with opened(pool={BUSYBOX: 1}) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        before = await waiting(engine, sandboxes)
        if "pull" in wanted:  # there is no registry, and who asks for it does not get what is there
            with pytest.raises(ImageUnavailable):
                async with box(sandboxes, **wanted):
                    pass
        else:
            async with box(sandboxes, **wanted) as own:
                assert await said(own, "echo $PWD") == "/workspace\n"
        assert await waiting(engine, sandboxes) == before


async def test_a_box_that_waits_has_no_owner_and_does_nothing_for_anybody(opened, tmp_path):
    async with opened(pool={BUSYBOX: 1}) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        (place,) = (tmp_path / "boxes").iterdir()
        with pytest.raises(AgentServerError):
            async with RemoteWorkspace(f"unix://{place}/run/box.sock") as workspace:
                await workspace.execute("true")


async def test_a_box_that_does_not_linger_waits_for_its_owner_all_the_same(opened, engine):
    async with opened(pool={BUSYBOX: 1}, linger=0.0) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        (first,) = await waiting(engine, sandboxes)
        async with box(sandboxes) as taken:
            assert await said(taken, "echo works") == "works\n"
            assert sandboxes.recorded("one").container == (await engine.inspect(first))["Name"].lstrip("/")


async def test_a_dead_one_is_passed_over(opened, engine):
    async with opened(pool={BUSYBOX: 2}) as sandboxes:
        await sandboxes.told.times(2, "box_waits")
        before = await waiting(engine, sandboxes)
        for id in before:
            await engine.kill(id)
        async with box(sandboxes) as alive:
            assert await said(alive, "echo works") == "works\n"


async def docker(*command):
    process = await asyncio.create_subprocess_exec("docker", *command, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


@asynccontextmanager
async def name_for(image):
    """Another name of an image."""
    name = f"agent-test/named-{new_id()}:1"
    await docker("tag", image, name)
    try:
        yield name
    finally:
        await docker("rmi", name)


async def test_one_whose_image_has_been_replaced_is_passed_over_and_removed(opened, engine):
    async with name_for(BUSYBOX) as name, opened(pool={name: 1}) as sandboxes:
        await sandboxes.told.times(1, "box_waits")
        (old,) = await waiting(engine, sandboxes)
        await docker("tag", FULL, name)
        async with box(sandboxes, image=name) as fresh:
            assert "GNU" in await said(fresh, "/bin/ls --version")
        assert old not in await waiting(engine, sandboxes)


async def test_leaving_ends_what_nobody_has_taken(opened, engine):
    async with opened(pool={BUSYBOX: 2}) as sandboxes:
        await sandboxes.told.times(2, "box_waits")
        kept = sandboxes.box("one", Sandbox(image=BUSYBOX), new_id())
        await kept.start()
        kept.let_go()
    (left,) = await containers(engine, sandboxes)
    assert left["Labels"][labels.CONVERSATION].startswith(NOBODY)  # it got an owner after its start
    async with opened() as sandboxes:
        found = await sandboxes.find("one")
        assert found.instance == kept.instance
        await found.end()


async def test_an_image_that_cannot_be_had_is_told_and_holds_nobody_up(opened):
    async with opened(pool={"agent-test/none:1": 1}) as sandboxes:
        await sandboxes.told.times(1, "pool_not_filled")
        async with box(sandboxes) as own:
            assert await said(own, "echo works") == "works\n"


SERVER = """
import asyncio, pathlib, sys
from agent_sdk import Sandbox
from agent_sdk.ids import new_id
from workspaces.box.sandboxes import Sandboxes, SandboxOptions

async def main():
    folder, runtimes, image, engine = sys.argv[1:]
    options = SandboxOptions(engine=engine, runtimes=pathlib.Path(runtimes), linger=120.0, pool={image: 2})
    async with Sandboxes(pathlib.Path(folder), options, tell=lambda event, _: print(event, flush=True)) as sandboxes:
        await asyncio.to_thread(sys.stdin.readline)
        await sandboxes.box("one", Sandbox(image=image), new_id()).start()
        await asyncio.Event().wait()

asyncio.run(main())
"""
"""A server that starts a sandbox when it is told to."""


@asynccontextmanager
async def server(folder, box_runtime, engine):
    """Such a server as a process with its first box waiting; killed at the end of the block."""
    (folder / "boxes").mkdir()
    command = [sys.executable, "-c", SERVER, str(folder), str(box_runtime), BUSYBOX, engine.url]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        async for line in process.stdout:
            if line == b"box_waits\n":
                break
        yield process
    finally:
        process.kill()
        await process.communicate()


def left_in(folder):
    places = ("boxes", "disks", "mounts", "workspaces", "spools/disks", "spools/mounts", "spools/workspaces")
    return [str(left.relative_to(folder)) for place in places for left in (folder / place).iterdir()]


@pytest.fixture
async def held():
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is short
        async with HeldEngine(Path(folder)) as held:
            yield held


async def test_what_waited_when_the_server_was_killed_is_swept_by_the_next(
    opened, engine, held, box_runtime, tmp_path
):
    async with server(tmp_path, box_runtime, held):
        pass
    mine = {labels.INSTANCE: (tmp_path / "instance").read_text().strip()}
    assert await engine.containers(mine) != []
    async with opened() as sandboxes:
        await nothing_is_left_of(engine, mine, str(tmp_path))
        await sandboxes.told.times(1, "swept")
        assert left_in(tmp_path) == []


async def test_a_server_that_is_killed_while_a_box_gets_its_owner_leaves_nothing(
    opened, engine, held, box_runtime, tmp_path
):
    async with server(tmp_path, box_runtime, held) as process:
        held.hold("GET", "containers/[0-9a-f]{64}/json", "asked")
        process.stdin.write(b"go\n")
        await held.reached()
        assert [place.name for place in (tmp_path / "boxes").iterdir() if place.name == "one"] == ["one"]
    async with opened() as sandboxes:
        found = await sandboxes.find("one")
        assert found.ended.done()
        assert found.last_words() == "its server ended before it was ready"
        await found.end()
        async with box(sandboxes) as next_one:
            assert await said(next_one, "echo works") == "works\n"
        await sandboxes.forget("one")
        await nothing_is_left_of(engine, {labels.INSTANCE: sandboxes.instance}, str(tmp_path))
        assert left_in(tmp_path) == []
