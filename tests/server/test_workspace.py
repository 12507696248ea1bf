"""The workspace of a hosted conversation: a box when it is needed, another when that is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import pytest

from agent_sdk.protocol.errors import ConnectionLost, PathNotFound, WorkspaceUnavailable
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_server.workspace import HostedWorkspace, Place
from tests.server.wire import GUARD
from workspaces.box_process import BoxProcess

ENVIRONMENT = {"PATH": os.environ["PATH"], "TESTS_RUN": os.environ["TESTS_RUN"]}


class Boxes:
    """Starts real boxes and remembers them."""

    def __init__(self, folder):
        self.folder = folder
        self.root = folder / "root"
        self.root.mkdir()
        self.started: list[BoxProcess] = []
        self.changes: list[str] = []
        self.lost = asyncio.Event()
        self.at_once = self.most_at_once = 0

    def changed(self, state: str) -> None:
        self.changes.append(state)
        if state == "lost":
            self.lost.set()

    @asynccontextmanager
    async def open(self):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        async with (
            BoxProcess(self.root, self.folder / "b.sock", environment=ENVIRONMENT) as box,
            RemoteWorkspace(box.url) as workspace,
        ):
            self.started.append(box)
            yield Place(workspace, box.wait_ended)
        self.at_once -= 1


@pytest.fixture
def boxes(tmp_path):
    return Boxes(tmp_path)


@pytest.fixture
async def workspace(boxes):
    async with HostedWorkspace(boxes.open, boxes.changed) as opened:
        yield opened


async def test_nothing_runs_before_the_first_use(workspace, boxes):
    assert not workspace.is_running
    assert await workspace.processes() == []
    assert boxes.started == []


async def test_many_first_uses_start_one_box(workspace, boxes):
    results = await asyncio.gather(*(workspace.execute(["echo", str(number)]) for number in range(5)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(5)]
    assert (len(boxes.started), boxes.changes) == (1, ["ready"])


async def test_a_lost_box_is_told_and_replaced(workspace, boxes):
    await workspace.files.write("kept", b"1")
    os.kill(boxes.started[0].pid, signal.SIGKILL)
    async with asyncio.timeout(GUARD):
        await boxes.lost.wait()
    assert await workspace.files.read("kept") == b"1"
    assert len(boxes.started) == 2


async def test_a_call_under_way_fails_when_its_box_is_lost(workspace, boxes):
    running = asyncio.create_task(workspace.execute("sleep 600"))
    await workspace.describe()
    os.kill(boxes.started[0].pid, signal.SIGKILL)
    with pytest.raises((ConnectionLost, WorkspaceUnavailable)):
        await running


async def test_a_box_that_is_let_go_of_comes_back(workspace, boxes):
    await workspace.shell().run("cd /; x=1")
    await workspace.release()
    assert (workspace.is_running, boxes.changes) == (False, ["ready", "stopped"])
    assert (await workspace.shell().run("echo $x$PWD")).output.text.strip().endswith(str(boxes.root))


async def test_the_next_box_waits_until_the_former_has_ended(workspace, boxes):
    await workspace.describe()
    releasing = asyncio.create_task(workspace.release())
    using = [asyncio.create_task(workspace.describe()) for _ in range(3)]
    await releasing
    assert [(await described).root for described in using] == [str(boxes.root)] * 3
    assert (len(boxes.started), boxes.most_at_once) == (2, 1)
    await workspace.release()
    assert boxes.at_once == 0


async def test_a_closed_workspace_starts_nothing(workspace, boxes):
    await workspace.close()
    with pytest.raises(WorkspaceUnavailable):
        await workspace.describe()
    assert boxes.started == []


async def test_why_a_box_does_not_start_is_told_to_all_who_wait(workspace, boxes):
    boxes.root.rmdir()
    results = await asyncio.gather(workspace.describe(), workspace.describe(), return_exceptions=True)
    assert [type(result) for result in results] == [PathNotFound] * 2
    boxes.root.mkdir()
    assert (await workspace.describe()).root == str(boxes.root)


async def test_giving_up_waiting_does_not_stop_the_start_for_others(workspace, boxes):
    first, second = (asyncio.create_task(workspace.describe()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).root == str(boxes.root)
    assert len(boxes.started) == 1


async def test_a_process_is_fed_in_several_writes(workspace):
    started = await workspace.start(["cat"])
    process = workspace.process(started.id)
    await process.write(b"one ")
    await process.write(b"two")
    await process.close_stdin()
    assert b"".join([data async for data in process.output()]) == b"one two"
    assert (await process.wait()).exit_code == 0
