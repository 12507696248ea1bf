"""Older formats of the log's file: brought up to date whole, or left as they were."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from agent_sdk.local.formats import VERSION
from agent_sdk.local.log import EventLog
from agent_sdk.protocol.events import Unknown, UserMessage, decode

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden_logs"


@pytest.fixture(params=["format_1", "format_2"])
def file(request, tmp_path):
    shutil.copytree(GOLDEN / request.param, tmp_path / "data")
    return tmp_path / "data" / "log.db"


def version(file: Path) -> int:
    connection = apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return connection.execute("PRAGMA user_version").fetchall()[0][0]
    finally:
        connection.close()


async def test_every_golden_log_opens_with_all_its_conversations(file):
    async with EventLog.open(file) as log:
        rows = {row.id: row for row in await log.list()}
        assert list(rows) == ["future", "empty", "unfinished", "finished"]
        assert [row.head_seq for row in rows.values()] == [22, 0, 7, 6]
        assert rows["finished"].meta == {"owner": "finished", "title": "Done"}
        assert not any(row.damaged for row in rows.values())
    assert version(file) == VERSION


async def test_a_turn_that_was_open_is_still_known_to_be_open(file):
    async with EventLog.open(file) as log:
        assert {row.id: row.open_turn for row in await log.list() if row.open_turn} == {"unfinished": "run-2"}


async def test_events_of_a_golden_log_are_read_and_new_ones_follow_them(file):
    for text in ("next", "and after a restart"):
        async with EventLog.open(file) as log:
            await log.create("finished")
            [event] = await log.append("finished", [UserMessage(text=text)])
            events = [decode(body) for _, body in await log.read("finished")]
            assert events[2].text == "hello" and events[-1] == event


async def test_an_event_of_a_later_version_is_kept_byte_for_byte(file):
    async with EventLog.open(file) as log:
        _, body = (await log.read("future"))[1]
        assert isinstance(decode(body), Unknown)
        assert body == b'{"type":"from_the_future","seq":2,"at":5.0,"something":[1,2]}'


async def test_operations_of_a_golden_log_are_remembered(file):
    async with EventLog.open(file) as log:
        assert (await log.operation("finished", "op-1")).result == b'{"seq":3,"run_id":"run-1"}'
        assert (await log.operation("unfinished", "op-1")).digest == b"e" * 32


async def test_operations_that_had_begun_and_settings_are_in_the_second_format(tmp_path):
    shutil.copytree(GOLDEN / "format_2", tmp_path / "data")
    async with EventLog.open(tmp_path / "data" / "log.db", sole=True) as log:
        assert [known.op_id for known in await log.open_operations("unfinished")] == ["op-2"]
        assert await log.settings("unfinished") == (b'{"model":"scripted"}', b"sealed")
        assert log.recovered == ()


async def test_a_log_of_the_first_format_learns_to_give_room_back(first):
    async with EventLog.open(first, sole=True) as log:
        assert log.recovered == ()
    connection = apsw.Connection(str(first), flags=apsw.SQLITE_OPEN_READONLY)
    assert connection.execute("PRAGMA auto_vacuum").fetchall() == [(2,)]
    connection.close()


@pytest.fixture
def first(tmp_path):
    shutil.copytree(GOLDEN / "format_1", tmp_path / "first")
    return tmp_path / "first" / "log.db"


OPEN = """
import sys
from pathlib import Path
from agent_sdk.local.database import Database
Database(Path(sys.argv[1])).close()
"""


def traced(file: Path, *rules: str) -> int:
    """Open the log in a process whose system calls fail by these rules; return how it ended."""
    rules = tuple(f"--inject={rule}" for rule in rules)
    command = ("strace", "-f", "-o", "/dev/null", *rules, sys.executable, "-c", OPEN, str(file))
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode != 0,
    reason="needs strace",
)


@needs_strace
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
async def test_a_process_that_is_killed_at_any_step_leaves_the_old_format_or_the_new(first, call):
    formats = []
    for step in range(1, 200, 1 if call == "fdatasync" else 4):
        folder = first.parent.with_name(f"killed-{step}")
        shutil.copytree(first.parent, folder)
        ended = traced(folder / first.name, f"{call}:signal=KILL:when={step}")
        if ended == 0:
            break
        formats.append(version(folder / first.name))
        async with EventLog.open(folder / first.name, sole=True) as log:
            assert log.recovered == ()
            assert [row.head_seq for row in await log.list()] == [22, 0, 7, 6]
            for row in await log.list():
                assert len(await log.read(row.id)) == row.head_seq
    assert formats and set(formats) <= {1, VERSION}
    assert call == "fdatasync" or 1 in formats


@needs_strace
async def test_without_room_the_old_format_stays_as_it_was(first):
    folder = first.parent.with_name("full")
    shutil.copytree(first.parent, folder)
    assert traced(folder / first.name, "pwrite64:error=ENOSPC:when=3+") == 1
    assert (folder / first.name).read_bytes() == first.read_bytes()
    assert version(folder / first.name) == 1


LIMITED = """
import resource, sys
from pathlib import Path
from agent_sdk.local.database import Database
from agent_sdk.protocol.errors import StorageFull
resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, resource.RLIM_INFINITY))
try:
    Database(Path(sys.argv[1]))
except StorageFull as exc:
    print(exc)
"""


def limited(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(file)], cwd=ROOT, capture_output=True, text=True
    )


async def test_a_migration_without_room_says_so_in_one_sentence(first):
    done = limited(first)
    assert done.stdout == f"no space is left for the log {first}; make room and try again\n", done.stderr
    assert version(first) == 1
    async with EventLog.open(first) as log:
        assert len(await log.list()) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_that_cannot_be_written_keeps_the_old_format(first):
    before = first.read_bytes()
    first.chmod(0o400)
    first.parent.chmod(0o500)
    with pytest.raises(PermissionError):
        async with EventLog.open(first):
            pass
    assert first.read_bytes() == before
