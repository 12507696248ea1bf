"""A box as a child process: its start, its end, and what it may know."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import msgspec
import psutil
import pytest

from agent_sdk.protocol.errors import PathNotFound, WorkspaceUnavailable
from agent_sdk.remote.workspace import RemoteWorkspace
from tests.chaos.server import environ, processes
from tests.pidfds import without_pidfds
from tests.server.wire import GUARD
from workspaces.box.process import MARKER, BoxProcess


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "box"


ENVIRONMENT = {"PATH": os.environ["PATH"], "TESTS_RUN": os.environ["TESTS_RUN"]}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_a_box_runs_commands_until_the_block_ends(root, folder):
    async with BoxProcess(root, folder, environment=ENVIRONMENT) as box:
        async with RemoteWorkspace(box.url, box.token) as workspace:
            assert (await workspace.execute("pwd")).stdout.strip() == str(root)
        pid = box.pid
    assert gone(pid)
    assert not folder.exists()


async def test_the_socket_is_for_its_owner_alone(root, folder):
    async with BoxProcess(root, folder, environment=ENVIRONMENT):
        assert stat.S_IMODE((folder / "box.sock").stat().st_mode) == 0o600


async def test_a_box_knows_nothing_of_the_servers_environment(root, folder):
    async with BoxProcess(root, folder, environment=ENVIRONMENT) as box:
        environ = Path(f"/proc/{box.pid}/environ").read_bytes().decode()
        names = {entry.partition("=")[0] for entry in environ.split("\0") if entry}
        assert names <= {*ENVIRONMENT, MARKER, "LC_CTYPE"}


async def test_no_secret_is_on_its_command_line(root, folder):
    async with BoxProcess(root, folder, environment=ENVIRONMENT) as box:
        command = psutil.Process(box.pid).cmdline()
        assert command[1:3] == ["-m", "agent_sdk.box"]


async def test_a_box_has_a_session_of_its_own(root, folder):
    async with BoxProcess(root, folder, environment=ENVIRONMENT) as box:
        assert os.getsid(box.pid) == box.pid


async def test_its_folder_may_have_a_path_that_is_too_long_for_a_socket(root, tmp_path):
    async with (
        BoxProcess(root, tmp_path / ("x" * 120), environment=ENVIRONMENT) as box,
        RemoteWorkspace(box.url, box.token) as workspace,
    ):
        assert (await workspace.execute("true")).exit_code == 0


async def test_a_box_that_dies_at_its_start_is_quoted(root, folder, tmp_path):
    box = BoxProcess(root, folder, working_dir=tmp_path / "nowhere", environment=ENVIRONMENT)
    with pytest.raises(WorkspaceUnavailable, match="the box ended at its start: box: .*nowhere") as refused:
        async with box:
            pass
    assert refused.value.details["phase"] == "start"
    assert not folder.exists()


async def test_a_root_that_is_missing_is_not_found(tmp_path, folder):
    with pytest.raises(PathNotFound):
        async with BoxProcess(tmp_path / "nowhere", folder):
            pass


async def test_cancelling_the_start_leaves_no_process(root, folder, tmp_path):
    os.mkfifo(tmp_path / "begun")
    (tmp_path / "sitecustomize.py").write_text(
        f"import time\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(600)\n"
    )
    box = BoxProcess(root, folder, environment={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)})
    starting = asyncio.create_task(box.__aenter__())
    await asyncio.to_thread((tmp_path / "begun").read_bytes)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert gone(box.pid)
    assert not folder.exists()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13])
async def test_a_start_can_be_cancelled_at_every_step(root, folder, steps):
    await cancelled_after(steps, BoxProcess(root, folder, environment=ENVIRONMENT))


async def cancelled_after(steps: int, box: BoxProcess) -> None:
    """Cancel its start after so many turns of the loop: nothing is left of it, and that soon."""
    starting = asyncio.create_task(box.start())
    for _ in range(steps):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert starting.cancelled()
    assert not box.folder.exists()
    marked = f"{MARKER}={box.instance}\0".encode()
    assert [process for process in processes() if marked in environ(process)] == []


async def test_a_box_that_was_killed_shows_how_it_ended(root, folder):
    async with BoxProcess(root, folder, environment=ENVIRONMENT) as box:
        os.kill(box.pid, signal.SIGKILL)
        async with asyncio.timeout(GUARD):
            assert await box.ended == -signal.SIGKILL
    assert not folder.exists()


async def test_what_runs_in_a_box_that_crashes_is_ended(root, folder):
    async with (
        BoxProcess(root, folder, environment=ENVIRONMENT) as box,
        RemoteWorkspace(box.url, box.token) as workspace,
    ):
        await workspace.start(["setsid", "sleep", "600"])
        running = [info.pid for info in await workspace.processes()]
        os.kill(box.pid, signal.SIGKILL)
    assert [gone(pid) for pid in running] == [True]


async def test_what_runs_in_a_box_ends_with_it(root, folder):
    async with (
        BoxProcess(root, folder, environment=ENVIRONMENT) as box,
        RemoteWorkspace(box.url, box.token) as workspace,
    ):
        process = await workspace.start(["sleep", "600"])
        running = [info.pid for info in await workspace.processes() if info.id == process.id]
    assert [gone(pid) for pid in running] == [True]


async def test_a_box_that_is_let_go_of_is_found_with_what_runs_in_it(root, folder):
    box = BoxProcess(root, folder, environment=ENVIRONMENT)
    await box.start()
    async with RemoteWorkspace(box.url, box.token) as workspace:
        process = await workspace.start(["cat"])
        await process.write(b"one ")
    box.let_go()
    async with await BoxProcess.find(folder) as found, RemoteWorkspace(found.url, found.token) as workspace:
        assert (found.pid, found.instance) == (box.pid, box.instance)
        assert [info.id for info in await workspace.processes()] == [process.id]
    assert gone(box.pid)
    assert not folder.exists()


async def test_a_box_without_company_ends_itself_and_leaves_nothing(root, folder, tmp_path):
    spool = tmp_path / "output" / "box"
    box = BoxProcess(root, folder, spool=spool, linger=0.0, environment=ENVIRONMENT)
    await box.start()
    async with RemoteWorkspace(box.url, box.token) as workspace:
        await workspace.execute("head -c 100000 /dev/zero; setsid sleep 600 >/dev/null 2>&1 & echo $! >pid")
        assert any(spool.iterdir())
    async with asyncio.timeout(GUARD):
        assert await box.ended == 0
    assert gone(int((root / "pid").read_text()))
    assert not folder.exists()
    assert not spool.exists()


async def test_what_a_dead_box_left_is_ended_and_removed_by_whoever_looks(root, folder, tmp_path):
    box = BoxProcess(root, folder, spool=tmp_path / "spool", environment=ENVIRONMENT)
    await box.start()
    async with RemoteWorkspace(box.url, box.token) as workspace:
        await workspace.start(["setsid", "sleep", "600"])
        running = [info.pid for info in await workspace.processes()]
        os.kill(box.pid, signal.SIGKILL)
        await box.ended
    assert await BoxProcess.find(folder, tmp_path / "spool") is None
    assert [gone(pid) for pid in running] == [True]
    assert not folder.exists()
    assert not (tmp_path / "spool").exists()


async def test_a_box_whose_starter_was_killed_before_it_wrote_the_pid_is_ended(root, folder):
    box = BoxProcess(root, folder, environment=ENVIRONMENT)
    await box.start()
    box.let_go()
    record = msgspec.json.decode((folder / "box.json").read_bytes())
    (folder / "box.json").write_bytes(msgspec.json.encode({**record, "pid": 0, "ticks": 0}))
    assert await BoxProcess.find(folder) is None
    assert gone(box.pid)


async def test_a_number_that_belongs_to_another_process_by_now_is_left_alone(folder):
    folder.mkdir()
    record = {
        "instance": "x",
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "started": 0,
    }
    (folder / "box.json").write_bytes(msgspec.json.encode({**record, "pid": os.getpid(), "ticks": 1}))
    assert await BoxProcess.find(folder) is None
    assert not folder.exists()


async def test_a_record_that_is_no_record_is_removed(folder):
    folder.mkdir()
    (folder / "box.json").write_text("{")
    assert await BoxProcess.find(folder) is None
    assert not folder.exists()


UNHELD = """
from pathlib import Path
from agent_sdk.protocol.errors import WorkspaceUnavailable
from workspaces.box.process import BoxProcess

async def main():
    root, folder, other = Path("root"), Path("box").absolute(), Path("other").absolute()
    environment = {"PATH": os.environ["PATH"], "TESTS_RUN": os.environ["TESTS_RUN"]}
    box = BoxProcess(root.absolute(), folder, environment=environment, linger=600)
    await box.start()
    print(box.pid)
    box.let_go()
    refuse_pidfds(434, 1)
    print(await BoxProcess.find(folder), folder.exists())
    try:
        await BoxProcess(root.absolute(), other, environment=environment, linger=600).start()
    except WorkspaceUnavailable as exc:
        print(exc)
    print(other.exists())
    await asyncio.to_thread(print, [p for p in os.listdir("/proc") if p.isdigit() and is_box(p)])

def is_box(pid):
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"agent_sdk.box" in text and os.fsencode(os.getcwd()) in text

asyncio.run(main())
"""


def test_a_box_that_cannot_be_held_is_ended(root, tmp_path):
    pid, *said = without_pidfds(tmp_path, UNHELD)
    assert said == [
        "refused 1",
        "None False",
        "the box did not start: Operation not permitted",
        "False",
        "[]",
    ]
    assert gone(int(pid))
