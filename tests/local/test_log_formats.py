"""Older formats of the log's file: brought up to date whole, or left as they were."""

import shutil
from pathlib import Path

import apsw
import pytest

from agent_sdk.local.formats import VERSION
from agent_sdk.local.log import EventLog
from agent_sdk.protocol.events import Unknown, UserMessage, decode

GOLDEN = Path(__file__).parent / "golden_logs"


@pytest.fixture(params=["format_1"])
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
