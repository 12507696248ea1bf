"""Events that are not what was written: cut off at the end, reported, and never served."""

from pathlib import Path

import apsw
import pytest

from agent_sdk.conversation.dispatch import Dispatcher
from agent_sdk.conversation.log import ConversationLog
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import ConversationDamaged, ConversationNotFound
from agent_sdk.protocol.events import LogRecovered, TurnEnded, TurnStarted, UserMessage, decode

COUNT = 5


@pytest.fixture
async def file(tmp_path):
    """A log with two conversations of five messages."""
    path = tmp_path / "log.db"
    async with EventLog.open(path) as log:
        for name in ("c", "sound"):
            await log.create(name)
            for number in range(COUNT):
                await log.append(name, [UserMessage(text=f"message {number}")])
    return path


def where(seq: int, conversation: int = 1) -> str:
    return f"WHERE id = {conversation << 36 | seq}"


def change(file: Path, statement: str) -> None:
    connection = apsw.Connection(str(file))
    connection.execute(statement)
    connection.close()


DAMAGE = {
    "another body": "UPDATE events SET body = CAST(replace(body, 'message', 'massage') AS BLOB) {where}",
    "another proof": "UPDATE events SET chain = zeroblob(16) {where}",
    "no body": "UPDATE events SET body = zeroblob(0) {where}",
    "missing": "DELETE FROM events {where}",
    "elsewhere": "UPDATE events SET id = id + 1000 {where}",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_damage_that_whole_events_follow_is_found_and_nothing_is_served(file, damage):
    change(file, damage.format(where=where(3)))
    async with EventLog.open(file) as log:
        epoch = await log.create("c")
        with pytest.raises(ConversationDamaged):
            await ConversationLog(log, "c", epoch, Dispatcher((), None)).replay()
        for call in (log.read("c"), log.append("c", [UserMessage(text="a")]), log.create("c"), log.head("c")):
            with pytest.raises(ConversationDamaged, match="it can only be deleted"):
                await call
        assert {row.id: row.damaged for row in await log.list()} == {"c": True, "sound": False}


async def test_a_damaged_conversation_stays_so_until_it_is_deleted(file):
    change(file, DAMAGE["another body"].format(where=where(3)))
    async with EventLog.open(file) as log:
        with pytest.raises(ConversationDamaged):
            await log.read("c")
    async with EventLog.open(file) as log:
        with pytest.raises(ConversationDamaged):
            await log.create("c")
        await log.delete("c")
        await log.create("c")
        assert await log.read("c") == []


async def test_other_conversations_go_on_beside_a_damaged_one(file):
    change(file, DAMAGE["another body"].format(where=where(3)))
    async with EventLog.open(file) as log:
        with pytest.raises(ConversationDamaged):
            await log.read("c")
        await log.append("sound", [UserMessage(text="more")])
        assert len(await log.read("sound")) == COUNT + 1


@pytest.mark.parametrize("damage", ["another body", "another proof", "no body"])
async def test_a_damaged_end_is_cut_off_and_reported_under_a_new_epoch(file, damage):
    async with EventLog.open(file) as log:
        epoch = await log.create("c")
        whole = (await log.read("c"))[:-1]
    change(file, DAMAGE[damage].format(where=where(COUNT)))
    async with EventLog.open(file) as log:
        journal = ConversationLog(log, "c", await log.create("c"), Dispatcher((), None))
        await journal.replay()
        assert journal.epoch not in ("", epoch)
        *before, (seq, body) = await log.read("c")
        assert before == whole
        report = decode(body)
        assert isinstance(report, LogRecovered)
        assert (seq, report.after_seq) == (COUNT, COUNT - 1)
        [event] = await log.append("c", [UserMessage(text="next")])
        assert event.seq == journal.head_seq + 1
    async with EventLog.open(file) as log:
        assert await log.create("c") == journal.epoch
        assert len(await log.read("c")) == COUNT + 1


async def test_the_end_of_a_conversation_in_use_is_not_cut_off_below_its_users(file):
    async with EventLog.open(file) as log:
        journal = ConversationLog(log, "c", await log.create("c"), Dispatcher((), None))
        await journal.replay()
        change(file, DAMAGE["another body"].format(where=where(COUNT)))
        for _ in range(2):
            with pytest.raises(ConversationDamaged):
                await log.read("c")
        with pytest.raises(ConversationDamaged):
            await journal.append(UserMessage(text="a"))
        epoch = await log.create("c")
        journal = ConversationLog(log, "c", epoch, Dispatcher((), None))
        await journal.replay()
        assert (journal.head_seq, journal.epoch != epoch) == (COUNT, True)


async def test_an_end_that_is_cut_off_may_open_a_turn_again(tmp_path):
    async with EventLog.open(tmp_path / "log.db") as log:
        await log.create("c")
        await log.append("c", [TurnStarted(run_id="r")])
        await log.append("c", [TurnEnded(run_id="r", status="finished")])
        assert [row.open_turn for row in await log.list()] == [None]
    change(tmp_path / "log.db", DAMAGE["no body"].format(where=where(2)))
    async with EventLog.open(tmp_path / "log.db") as log:
        await log.create("c")
        await log.read("c", mend=True)
        assert [row.open_turn for row in await log.list()] == ["r"]


async def test_a_page_in_the_middle_is_proven_too(file):
    change(file, DAMAGE["another body"].format(where=where(3)))
    async with EventLog.open(file) as log:
        assert len(await log.read("c", after=3)) == COUNT - 3
        with pytest.raises(ConversationDamaged):
            await log.read("c", after=2)


@pytest.mark.parametrize("field", ["id", "epoch", "meta", "open_turn", "origin"])
async def test_a_row_of_a_conversation_that_was_changed_is_damage(file, field):
    kind = "BLOB" if field in ("meta", "origin") else "TEXT"
    change(file, f"UPDATE conversations SET {field} = CAST('x' AS {kind}) WHERE id = 'c'")
    async with EventLog.open(file) as log:
        with pytest.raises((ConversationDamaged, ConversationNotFound)):
            await log.read("c")
            await log.epoch("c")
        assert [row.damaged for row in await log.list()] == [False, True]


async def test_settings_that_were_changed_are_not_served(file):
    async with EventLog.open(file) as log:
        await log.store_settings("c", b"{}", b"sealed")
    change(file, "UPDATE settings SET sealed = CAST('sealee' AS BLOB)")
    async with EventLog.open(file) as log:
        with pytest.raises(ConversationDamaged):
            await log.settings("c")


async def test_a_seq_beyond_everything_reads_nothing(file):
    async with EventLog.open(file) as log:
        assert await log.read("c", after=2**63) == []
        assert len(await log.read("c", after=-1)) == COUNT
