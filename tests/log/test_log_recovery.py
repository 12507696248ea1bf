"""A file that is damaged below its rows: found when it is opened, saved as far as it is whole, never served."""

import random
import shutil
import struct
from pathlib import Path

import pytest

from agent_sdk.conversation.dispatch import Dispatcher
from agent_sdk.conversation.log import ConversationLog
from agent_sdk.idempotency import Asked
from agent_sdk.log.event_log import EventLog, Operation
from agent_sdk.log.recovery import commits_lost, frames_read
from agent_sdk.log.storage import Storage
from agent_sdk.protocol.errors import AgentServerError, ConversationDamaged
from agent_sdk.protocol.events import LogRecovered, UserMessage, decode

NAMES = ("a", "b", "c")
COUNT = 30
PAGE = 4096
FRAME = PAGE + 24


async def write(log: EventLog, count: int = COUNT) -> None:
    for name in NAMES:
        await log.create(name, {"owner": name})
    for number in range(count):
        for name in NAMES:
            op = Operation(f"op-{number}", b"digest", b"answer")
            await log.append(name, [UserMessage(text=f"{name} {number} " + "x" * 700)], op=op)


@pytest.fixture
async def file(tmp_path):
    """A closed log, all of it in one file."""
    path = tmp_path / "log.db"
    async with EventLog.open(path) as log:
        await write(log)
    return path


@pytest.fixture
async def killed(tmp_path):
    """What a killed process leaves: the last commits are in the WAL."""
    path = tmp_path / "log.db"
    async with EventLog.open(path) as log:
        await write(log, 1)
    (tmp_path / "left").mkdir()
    async with EventLog.open(path) as log:
        await write(log, 3)
        for name in ("log.db", "log.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / "left" / name)
    return tmp_path / "left" / "log.db"


async def replayed(log: EventLog, name: str) -> list[str]:
    """The texts of a conversation, with a `!` for a report of damage."""
    journal = ConversationLog(log, name, await log.create(name), Dispatcher((), None))
    await journal.replay()
    events = [decode(body) for _, body in await log.read(name)]
    return [event.text if isinstance(event, UserMessage) else "!" for event in events]


def expected(name: str, count: int = COUNT) -> list[str]:
    return [f"{name} {number} " + "x" * 700 for number in range(count)]


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def wal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


async def test_a_log_that_was_left_by_a_killed_process_is_whole(killed):
    async with EventLog.open(killed, sole=True) as log:
        assert log.recovered == ()
        assert [await replayed(log, name) for name in NAMES] == [
            ["a 0 " + "x" * 700, *expected("a", 3)[1:2], *expected("a", 3)[2:]],
            expected("b", 3),
            expected("c", 3),
        ]


async def test_commits_that_a_damaged_wal_has_lost_are_reported_under_a_new_epoch(killed):
    epochs = {row.id: row.epoch for row in await listed(killed)}
    flip(wal_of(killed), 32 + 24 + 100)
    async with EventLog.open(killed, sole=True) as log:
        assert len(log.recovered) == 1
        for name in NAMES:
            texts = await replayed(log, name)
            assert texts == [*expected(name, len(texts) - 1), "!"]
            assert await log.epoch(name) != epochs[name]
    async with EventLog.open(killed, sole=True) as log:
        assert log.recovered == ()


async def listed(file: Path):
    """The rows of a log, without touching it."""
    copy = file.parent.with_name("copy")
    shutil.copytree(file.parent, copy)
    async with EventLog.open(copy / file.name) as log:
        return await log.list()


async def test_a_damaged_header_of_the_wal_is_reported(killed):
    flip(wal_of(killed), 20)
    async with EventLog.open(killed, sole=True) as log:
        assert len(log.recovered) == 1


async def test_a_commit_that_was_cut_short_is_no_damage(killed):
    wal = wal_of(killed)
    wal.write_bytes(wal.read_bytes()[: -FRAME // 2])
    async with EventLog.open(killed, sole=True) as log:
        assert log.recovered == ()
        assert await replayed(log, "a") == expected("a", 3)


async def test_every_frame_but_those_of_the_last_commit_is_watched(killed):
    wal = wal_of(killed)
    whole = wal.read_bytes()
    frames = (len(whole) - 32) // FRAME
    ends = [nth for nth in range(frames) if struct.unpack_from(">I", whole, 32 + nth * FRAME + 4)[0]]
    for nth in range(0, ends[-2] + 1, 3):
        folder = killed.parent.with_name(f"frame-{nth}")
        shutil.copytree(killed.parent, folder)
        flip(folder / wal.name, 32 + nth * FRAME + 24 + 500, bit=3)
        async with EventLog.open(folder / killed.name, sole=True) as log:
            assert len(log.recovered) == 1, f"frame {nth} of {frames}"


def test_what_sqlite_has_read_needs_no_second_look_and_the_rest_gets_one(killed):
    wal = wal_of(killed)
    whole = wal.read_bytes()
    frames = (len(whole) - 32) // FRAME
    for nth in (*range(0, frames, 5), frames - 1, None):
        wal.write_bytes(whole)
        if nth is not None:
            flip(wal, 32 + nth * FRAME + 24 + 500)
        asked = Storage(killed, read_only=True)
        asked.value("SELECT count(*) FROM sqlite_schema")
        read = frames_read(killed)
        asked.close()
        assert (read == frames) == (nth is None)
        assert commits_lost(wal, read) == commits_lost(wal), nth


async def test_a_page_that_makes_no_sense_costs_only_the_conversations_on_it(file):
    data = bytearray(file.read_bytes())
    place = data.index(b"b 3 xxx") // PAGE * PAGE
    data[place : place + PAGE] = random.Random(1).randbytes(PAGE)
    file.write_bytes(data)
    async with EventLog.open(file, sole=True) as log:
        [sentence] = log.recovered
        kept = Path(sentence.rsplit(" ", 1)[1])
        assert kept.read_bytes()[place : place + PAGE] == data[place : place + PAGE]
        rows = {row.id: row.damaged for row in await log.list()}
        assert rows["b"] is True and False in rows.values()
        for name in (name for name, damaged in rows.items() if not damaged):
            assert await replayed(log, name) == [*expected(name), "!"]
            await log.append(name, [UserMessage(text="next")])
            assert (await log.operations(name).find(Asked("op-1"))).answer == b"answer"
        with pytest.raises(ConversationDamaged):
            await log.read("b")
    async with EventLog.open(file, sole=True) as log:
        assert log.recovered == ()
        assert {row.id: row.damaged for row in await log.list()} == rows


async def test_a_file_that_lost_its_last_pages_keeps_what_is_before_them(file):
    data = file.read_bytes()
    file.write_bytes(data[: -3 * PAGE])
    async with EventLog.open(file, sole=True) as log:
        assert len(log.recovered) == 1
        for row in await log.list():
            if not row.damaged:
                texts = await replayed(log, row.id)
                assert texts in (expected(row.id), [*expected(row.id, len(texts) - 1), "!"])


@pytest.mark.parametrize("seed", range(4))
async def test_no_flipped_bit_is_ever_served(file, seed, tmp_path):
    """Each flip ends in the whole truth, its beginning with a report, or an error; twice the same way."""
    whole, numbers = file.read_bytes(), random.Random(seed)
    for number in range(40):
        folder = tmp_path / f"flip-{number}"
        folder.mkdir()
        copy = folder / file.name
        copy.write_bytes(whole)
        flip(copy, place := numbers.randrange(len(whole)), numbers.randrange(8))
        for _ in range(2):
            await judge(copy, place)


async def judge(file: Path, place: int) -> None:
    try:
        async with EventLog.open(file, sole=True) as log:
            for row in await log.list():
                try:
                    texts = await replayed(log, row.id)
                except AgentServerError:
                    continue
                cut = [*expected(row.id, len(texts) - 1), "!"]
                assert texts in (expected(row.id), cut), f"byte {place}"
    except AgentServerError as exc:
        assert "folder" in str(exc) or "damaged" in str(exc), f"byte {place}: {exc}"


async def test_what_can_be_no_log_is_one_clear_sentence(tmp_path):
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere.db")
    (tmp_path / "alone.db-wal").write_bytes(b"x" * 100)
    (tmp_path / "zero.db").write_bytes(b"")
    (tmp_path / "zero.db-wal").write_bytes(b"x" * 100)
    (tmp_path / "noise.db").write_bytes(random.Random(1).randbytes(10_000))
    before = sorted(tmp_path.iterdir())
    for name in ("folder", "link", "alone", "zero", "noise"):
        for _ in range(2):
            with pytest.raises(AgentServerError, match=r"folder|bring .* back"):
                async with EventLog.open(tmp_path / f"{name}.db", sole=True):
                    pass
    assert [path for path in sorted(tmp_path.iterdir()) if path.suffix != ".reserve"] == before


async def test_nothing_is_reported_twice(killed):
    flip(wal_of(killed), 32 + 24 + 100)
    async with EventLog.open(killed, sole=True):
        pass
    for _ in range(2):
        async with EventLog.open(killed, sole=True) as log:
            await log.create("a")
            events = [decode(body) for _, body in await log.read("a")]
            assert sum(isinstance(event, LogRecovered) for event in events) == 1
