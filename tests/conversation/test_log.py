"""One conversation's part of the log: who waits, who follows, and what they can rely on."""

import asyncio

import pytest

from agent_sdk.conversation.dispatch import Dispatcher
from agent_sdk.conversation.log import ConversationLog
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import ConversationNotFound
from agent_sdk.protocol.events import UserMessage


@pytest.fixture(params=["file", "memory"])
async def journal(request, tmp_path):
    async with EventLog.open(tmp_path / "log.sqlite" if request.param == "file" else None) as log:
        yield ConversationLog(log, "c", await log.create("c"), Dispatcher((), None))


async def test_an_event_is_told_to_everybody_although_its_writer_was_cancelled(journal):
    heard = []
    journal.delivery.subscribe(lambda seq, body: heard.append(seq))
    writer = asyncio.create_task(journal.append(UserMessage(text="a")))
    await asyncio.sleep(0)
    writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)
    await journal.settle()
    assert (heard, journal.head_seq, bool(journal.history.unread)) == ([1], 1, True)


async def test_what_follows_from_an_event_is_known_before_its_writer_goes_on(journal):
    for seq in range(1, 50):
        await journal.append(UserMessage(text="a"))
        assert journal.head_seq == seq


async def test_nobody_is_shown_an_event_before_what_follows_from_it_is_known(journal):
    """For a moment the file is ahead of everybody; readers that are always there would notice."""
    await journal.append(UserMessage(text="a"))

    async def write():
        for _ in range(300):
            await journal.append(UserMessage(text="a"))

    async def read():
        while not writing.done():
            async for seq, _ in journal.pages(journal.head_seq - 1):
                assert seq <= journal.head_seq

    writing = asyncio.create_task(write())
    await asyncio.gather(writing, *(read() for _ in range(5)))


async def test_an_event_that_was_not_written_is_told_to_nobody(journal):
    heard = []
    journal.delivery.subscribe(lambda seq, body: heard.append(seq))
    await journal.log.delete("c")
    with pytest.raises(ConversationNotFound):
        await journal.append(UserMessage(text="a"))
    await journal.settle()
    assert (heard, journal.head_seq) == ([], 0)
