"""From the log to one connection: the moments at which an event could be lost or sent twice."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import msgspec
import pytest

from agent_sdk.protocol.errors import ConversationDamaged, ConversationNotFound
from agent_sdk.protocol.methods.connection import DeltaNotice, EventsNotice, SyncReset
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.peer import SLOW_READER, TOO_BIG, Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_server.session.subscription import Subscription
from tests.server.wire import GUARD


class Source:
    """A conversation whose log and announcements the test controls."""

    epoch = "e1"

    def __init__(self, head: int) -> None:
        self.log = [self.event(seq) for seq in range(1, head + 1)]
        self.head_seq = head
        self.listeners = []
        self.deltas = []
        self.after_page = lambda: None
        self.turned = asyncio.Event()

    @staticmethod
    def event(seq: int) -> tuple[int, bytes]:
        return seq, b'{"type":"title_changed","seq":%d}' % seq

    async def page(self, after: int) -> list[tuple[int, bytes]]:
        page = self.log[after : after + 5]  # at most half of the reader's budget, as real pages are
        await asyncio.sleep(0)
        self.after_page()
        return page

    def write(self) -> None:
        """An event enters the log; it is announced later."""
        self.log.append(self.event(len(self.log) + 1))

    def announce(self) -> None:
        """The next event of the log is announced."""
        self.head_seq += 1
        for listener in list(self.listeners):
            listener(*self.log[self.head_seq - 1])

    def say(self, text: str) -> None:
        """A piece of an answer comes."""
        for listener in list(self.deltas):
            listener(b'{"text":"%b"}' % text.encode())

    def subscribe(self, listener):
        self.listeners.append(listener)
        self.turned.set()
        return lambda: self.listeners.remove(listener)

    def subscribe_deltas(self, listener):
        self.deltas.append(listener)
        return lambda: self.deltas.remove(listener)


class Reader:
    """The client's end."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.came_in: list[object] = []
        """Seqs of events and texts of deltas, in their order."""
        self.resets: list[SyncReset] = []
        self.stuck: list[int] = []
        self.bugs: list[BaseException] = []
        self.given_up = asyncio.Event()
        self.came = asyncio.Event()

    def give_up(self, code: int, reason: str) -> None:
        self.stuck.append(code)
        self.given_up.set()

    def noticed(self, method, params) -> None:
        if method == EventsNotice.method:
            events = msgspec.json.decode(params, type=EventsNotice).events
            seqs = [msgspec.json.decode(event)["seq"] for event in events]
            self.seqs += seqs
            self.came_in += seqs
        elif method == DeltaNotice.method:
            delta = msgspec.json.decode(params, type=DeltaNotice).delta
            self.came_in.append(msgspec.json.decode(delta)["text"])
        elif method == SyncReset.method:
            self.resets.append(msgspec.json.decode(params, type=SyncReset))
        self.came.set()

    async def until(self, seq: int) -> list[int]:
        """Wait for this event, and for whatever would follow it at once; returns all seqs."""
        async with asyncio.timeout(GUARD):
            while seq not in self.seqs:
                self.came.clear()
                await self.came.wait()
            for _ in range(20):
                await asyncio.sleep(0)
        return self.seqs


@pytest.fixture
async def connected():
    """A reader, and the server's end of its connection."""
    here, there = memory_pipes()
    reader = Reader()
    async with (
        Peer(there, opener=True, on_notice=reader.noticed),
        Peer(here, opener=False, limits=Limits(queue_bytes=1 << 20)) as peer,
    ):
        yield reader, peer


@asynccontextmanager
async def subscribed(source, reader, peer, cursor=(None, 0), *, patience=GUARD):
    fed = Subscription(source, peer, reader.give_up, reader.bugs.append, patience=patience)
    fed.begin(*cursor)
    yield fed
    fed.close()
    await asyncio.sleep(0)
    assert reader.bugs == []


async def live(source) -> None:
    """Wait until somebody listens."""
    async with asyncio.timeout(GUARD):
        while not source.listeners:
            source.turned.clear()
            await source.turned.wait()


def large(seq: int) -> tuple[int, bytes]:
    """An event of 100 KB: ten of them are over the budget."""
    return seq, b'{"seq":%d,"x":"%b"}' % (seq, b"x" * 100_000)


async def test_replay_comes_first_and_live_events_follow(connected):
    reader, peer = connected
    source = Source(25)
    async with subscribed(source, reader, peer, (None, 3)):
        await live(source)
        source.write()
        source.announce()
        assert await reader.until(26) == list(range(4, 27))


async def test_an_event_that_comes_after_the_last_page_is_not_lost(connected):
    reader, peer = connected
    source = Source(1)

    def once() -> None:
        source.after_page = lambda: None
        source.write()
        source.announce()

    source.after_page = once
    async with subscribed(source, reader, peer, (None, 1)):
        assert await reader.until(2) == [2]


async def test_deltas_that_come_during_the_replay_take_their_place_among_the_events(connected):
    reader, peer = connected
    source = Source(7)

    def first() -> None:
        source.after_page = second
        source.say("a")

    def second() -> None:
        source.after_page = lambda: None
        source.write()
        source.announce()
        source.say("b")

    source.after_page = first
    async with subscribed(source, reader, peer, (None, 1)):
        await live(source)
        source.say("c")
        source.write()
        source.announce()
        await reader.until(9)
    assert reader.came_in == [2, 3, 4, 5, 6, 7, "a", 8, "b", "c", 9]


async def test_a_long_replay_keeps_64_KiB_of_deltas_at_most(connected):
    reader, peer = connected
    source = Source(1)

    def talk() -> None:
        source.after_page = lambda: None
        for _ in range(100):
            source.say("x" * 1000)

    source.after_page = talk
    async with subscribed(source, reader, peer):
        await live(source)
        source.write()
        source.announce()
        await reader.until(2)
    assert 0 < len(reader.came_in) - 2 <= 64


async def test_an_event_that_was_read_before_it_is_announced_is_not_repeated(connected):
    reader, peer = connected
    source = Source(1)
    source.write()
    async with subscribed(source, reader, peer):
        await live(source)
        source.announce()
        source.write()
        source.announce()
        assert await reader.until(3) == [1, 2, 3]


@pytest.mark.parametrize(("epoch", "after"), [("e0", 1), ("e1", 9), (None, 9)])
async def test_a_cursor_that_means_nothing_resets_before_the_first_event(connected, epoch, after):
    reader, peer = connected
    async with subscribed(Source(2), reader, peer, (epoch, after)):
        assert await reader.until(2) == [1, 2]
    assert [(reset.epoch, reset.from_seq) for reset in reader.resets] == [("e1", 1)]


async def test_a_closed_subscription_sends_nothing_more(connected):
    reader, peer = connected
    source = Source(1)
    async with subscribed(source, reader, peer) as fed:
        await live(source)
        fed.close()
        assert (source.listeners, source.deltas) == ([], [])


async def test_a_live_reader_that_falls_behind_catches_up_from_the_log(connected):
    reader, peer = connected
    source = Source(0)
    async with subscribed(source, reader, peer):
        await live(source)
        for seq in range(1, 30):
            source.log.append(large(seq))
            source.announce()
        assert (source.listeners, source.deltas) == ([], []), "nothing is queued beyond the budget"
        assert await reader.until(29) == list(range(1, 30))
        await live(source)
        source.write()
        source.announce()
        assert await reader.until(30) == list(range(1, 31))
    assert reader.stuck == []


@pytest.mark.parametrize("is_live", [True, False])
async def test_a_reader_that_takes_nothing_is_given_up(is_live):
    here, _ = memory_pipes()
    reader, source = Reader(), Source(0)
    async with Peer(here, opener=False, limits=Limits(queue_bytes=1 << 20)) as peer:
        if not is_live:
            source.log = [large(seq) for seq in range(1, 30)]
            source.head_seq = 29
        async with subscribed(source, reader, peer, patience=0.1):
            if is_live:
                await live(source)
                for seq in range(1, 30):
                    source.log.append(large(seq))
                    source.announce()
            async with asyncio.timeout(GUARD):
                await reader.given_up.wait()
    assert reader.stuck == [SLOW_READER]
    assert source.listeners == []


async def test_a_reader_is_waited_for_while_it_replays(connected):
    reader, peer = connected
    source = Source(0)
    source.log = [large(seq) for seq in range(1, 100)]
    source.head_seq = 99
    async with subscribed(source, reader, peer):
        assert await reader.until(99) == list(range(1, 100))
    assert reader.stuck == []


async def test_an_event_that_the_reader_cannot_take_is_not_skipped_in_silence(connected):
    reader, peer = connected
    peer.other_limits = Limits(message_bytes=64 << 10)
    source = Source(0)
    async with subscribed(source, reader, peer):
        await live(source)
        source.log.append(large(1))
        source.announce()
    assert reader.stuck == [TOO_BIG]


async def test_a_subscription_of_a_connection_that_ends_while_it_replays_ends_too(connected):
    reader, peer = connected
    source = Source(0)
    source.log = [large(seq) for seq in range(1, 100)]
    source.head_seq = 99
    async with subscribed(source, reader, peer):
        await peer.close()
    assert (reader.stuck, source.listeners) == ([], [])


async def test_an_event_longer_than_the_budget_arrives_in_its_place(connected):
    reader, peer = connected
    source = Source(0)
    source.log = [large(1), (2, b'{"seq":2,"x":"%b"}' % (b"x" * (3 << 20))), large(3)]
    source.head_seq = 3
    async with subscribed(source, reader, peer):
        assert await reader.until(3) == [1, 2, 3]
        await live(source)
        for seq in (4, 5, 6):
            source.log.append((seq, b'{"seq":%d,"x":"%b"}' % (seq, b"x" * (3 << 20))))
            source.announce()
        assert await reader.until(6) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConversationNotFound("no conversation"), 4404), (ConversationDamaged("damaged"), 1011)],
)
async def test_a_log_that_cannot_be_read_any_more_ends_the_connection_and_is_no_bug(connected, error, code):
    reader, peer = connected

    def fail() -> None:
        raise error

    source = Source(3)
    source.after_page = fail
    async with subscribed(source, reader, peer), asyncio.timeout(GUARD):
        await reader.given_up.wait()
    assert reader.stuck == [code]
