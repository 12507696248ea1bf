"""The format of the log's file: what was written once is read for ever, and a file is made whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from agent_sdk.idempotency import Asked
from agent_sdk.log.event_log import EventLog
from agent_sdk.log.formats import VERSION
from agent_sdk.protocol.errors import Conflict
from agent_sdk.protocol.events import Unknown, UserMessage, decode

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden_logs"


@pytest.fixture
def file(tmp_path):
    shutil.copytree(GOLDEN / "format_2", tmp_path / "data")
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
        assert (await log.operations("finished").find(Asked("op-1"))).answer == b'{"seq":3,"run_id":"run-1"}'
        assert await log.operations("unfinished").find(Asked("op-1", b"e" * 32))


async def test_operations_that_had_begun_and_settings_of_a_golden_log_are_remembered(file):
    async with EventLog.open(file, sole=True) as log:
        assert [known.op_id for known in await log.operations("unfinished").begun()] == ["op-2"]
        assert await log.settings("unfinished") == (b'{"model":"scripted"}', b"sealed")
        assert log.recovered == ()


async def test_a_format_that_was_never_released_is_refused_and_left_as_it_is(tmp_path):
    file = tmp_path / "log.db"
    connection = apsw.Connection(str(file))
    connection.execute("CREATE TABLE conversations (key INTEGER PRIMARY KEY); PRAGMA user_version=1")
    connection.close()
    before = file.read_bytes()
    with pytest.raises(Conflict, match=r"log\.db has format 1, .* use another folder"):
        async with EventLog.open(file, sole=True):
            pass
    assert file.read_bytes() == before


OPEN = """
import sys
from pathlib import Path
from agent_sdk.log.database import Database
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
async def test_a_process_that_is_killed_at_any_step_of_making_a_log_leaves_none_or_a_whole_one(
    tmp_path, call
):
    killed = 0
    for step in range(1, 200):
        file = tmp_path / f"killed-{step}" / "log.db"
        file.parent.mkdir()
        if traced(file, f"{call}:signal=KILL:when={step}") == 0:
            break
        killed += 1
        async with EventLog.open(file, sole=True) as log:
            assert log.recovered == ()
            await log.create("first")
            assert [row.id for row in await log.list()] == ["first"]
        assert version(file) == VERSION
    assert killed > 2
