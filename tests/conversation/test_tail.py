"""Reading a log and going on with what comes, however slow the reader is."""

import asyncio

import pytest

from agent_sdk.conversation.dispatch import Dispatcher
from agent_sdk.conversation.log import ConversationLog, Tail
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import UserMessage


@pytest.fixture
async def journal():
    async with EventLog.open(None) as log:
        yield ConversationLog(log, "c", await log.create("c"), Dispatcher((), None))


async def test_a_reader_that_is_far_behind_misses_nothing(journal):
    follower = Tail(journal, 0)
    events = follower.events(follow=True)
    await journal.append(UserMessage(text="first"))
    seqs = [(await anext(events)).seq]
    for _ in range(20):
        await journal.append(*(UserMessage(text="x" * 60_000) for _ in range(5)))
    follower.end()
    async with asyncio.timeout(30):
        seqs += [event.seq async for event in events]
    assert seqs == list(range(1, 102))
    follower.close()


async def test_what_comes_while_the_log_is_read_is_yielded_once(journal):
    await journal.append(UserMessage(text="a"))
    follower = Tail(journal, 0)
    events = follower.events(follow=True)
    seqs = [(await anext(events)).seq]
    await journal.append(UserMessage(text="b"), UserMessage(text="c"))
    follower.end()
    seqs += [event.seq async for event in events]
    assert seqs == [1, 2, 3]


async def test_writing_and_reading_at_the_same_time_loses_and_repeats_nothing(journal):
    follower = Tail(journal, 0)

    async def write():
        for number in range(300):
            await journal.append(UserMessage(text="x" * (number * 50)))
        follower.end()

    async def read():
        return [event.seq async for event in follower.events(follow=True)]

    async with asyncio.timeout(30):
        seqs, _ = await asyncio.gather(read(), write())
    assert seqs == list(range(1, 301))


async def test_a_reader_that_does_not_follow_gets_what_there_is(journal):
    await journal.append(UserMessage(text="a"), UserMessage(text="b"))
    follower = Tail(journal, 1)
    assert [event.seq async for event in follower.events(follow=False)] == [2]
    follower.close()
    await journal.append(UserMessage(text="c"))
