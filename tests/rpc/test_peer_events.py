"""Events and notices: in order, together where they wait together, whole however long, never waited for."""

import asyncio
import json

import msgspec
import pytest

from agent_sdk.protocol import frame
from agent_sdk.protocol.errors import ConnectionLost, LimitExceeded
from agent_sdk.protocol.methods.connection import Draining, EventsNotice, Ping, Pong, SyncReset
from agent_sdk.protocol.methods.conversation import SendMessage
from agent_sdk.protocol.methods.workspace import DiffText, GitDiff
from agent_sdk.protocol.results import Accepted
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from tests.rpc.links import Raw, raw_to_peer

pytestmark = pytest.mark.timeout(60)

LONG = 20 << 20


def event(seq, size=0):
    return b'{"type":"x","seq":%d,"text":"%b"}' % (seq, b"x" * size)


class Listener:
    """What came by notice, and a way to wait for it."""

    def __init__(self) -> None:
        self.methods = []
        self.events = []
        self.epochs = []
        self._moved = asyncio.Event()

    def __call__(self, method, params):
        self.methods.append(method)
        if method == "events":
            notice = msgspec.json.decode(params, type=EventsNotice)
            self.events += [bytes(raw) for raw in notice.events]
            self.epochs.append(notice.epoch)
        self._moved.set()

    async def until(self, count):
        while len(self.events) < count:
            self._moved.clear()
            await self._moved.wait()


async def test_events_arrive_once_and_in_order(peers):
    listener = Listener()
    async with peers(own={"on_notice": listener}) as (_, server):
        sent = [event(seq, seq % 2000) for seq in range(3000)]
        for one in sent:
            assert server.publish(one, epoch="e")
            await server.room()
        await listener.until(3000)
    assert listener.events == sent


async def test_events_that_wait_together_share_a_frame():
    async with raw_to_peer() as (raw, peer):
        for seq in range(100):
            peer.publish(event(seq), epoch="e")
        notice = await raw.receive()
        assert notice["method"] == "events"
        assert notice["params"]["epoch"] == "e"
        assert [one["seq"] for one in notice["params"]["events"]] == list(range(100))


async def test_a_frame_of_events_is_at_most_64_kib_long():
    async with raw_to_peer() as (raw, peer):
        for seq in range(20):
            peer.publish(event(seq, 10_000), epoch="e")
        counts = []
        while sum(counts) < 20:
            frame, _ = await raw.pipe.receive()
            assert len(frame) <= (64 << 10) + 100
            counts.append(len(json.loads(frame)["params"]["events"]))
        assert counts == [6, 6, 6, 2]


async def test_events_of_two_epochs_do_not_share_a_frame():
    async with raw_to_peer() as (raw, peer):
        for seq, epoch in enumerate("aab"):
            peer.publish(event(seq), epoch=epoch)
        assert [(await raw.receive())["params"]["epoch"] for _ in range(2)] == ["a", "b"]


async def test_deltas_keep_their_place_among_the_events():
    async with raw_to_peer() as (raw, peer):
        peer.publish(event(1), epoch="e")
        peer.publish_delta(b'{"run_id":"r","after_seq":1,"text":"a"}')
        peer.publish(event(2), epoch="e")
        first, delta, second = [await raw.receive() for _ in range(3)]
        assert [first["method"], delta["method"], second["method"]] == ["events", "delta", "events"]
        assert delta["params"]["delta"]["after_seq"] == 1


async def test_answers_and_notices_overtake_events():
    async with raw_to_peer() as (raw, peer):
        for seq in range(100):
            peer.publish(event(seq, 30_000), epoch="e")
        await raw.receive()
        peer.notify(Draining(retry_after_ms=5))
        await raw.call(1, "ping")
        methods = []
        while "ping" not in methods:
            message = await raw.receive()
            methods.append("ping" if "id" in message else message["method"])
        assert "draining" in methods
        assert len(methods) < 20


async def test_a_reader_that_is_too_slow_is_noticed_and_nobody_waits_for_it():
    async with raw_to_peer(limits=Limits(queue_bytes=100_000)) as (raw, peer):
        accepted = 0
        while peer.publish(event(accepted, 1000), epoch="e"):
            accepted += 1
        assert 95 <= accepted <= 100
        await peer.close(4408, "events are not read")
        with pytest.raises(ConnectionLost) as caught:
            while True:
                await raw.receive()
        assert caught.value.details["close_code"] == 4408


async def test_deltas_are_left_out_when_half_the_budget_is_used():
    async with raw_to_peer(limits=Limits(queue_bytes=100_000)) as (raw, peer):
        for seq in range(60):
            assert peer.publish(event(seq, 1000), epoch="e")
            peer.publish_delta(b'{"run_id":"r","after_seq":%d}' % seq)
        got = []
        while len(got) < 60 or got[-1] != 59:
            message = await raw.receive()
            if message["method"] == "delta":
                got.append("delta")
            else:
                got += [one["seq"] for one in message["params"]["events"]]
        assert 40 < got.count("delta") < 55
        assert [one for one in got if one != "delta"] == list(range(60))


async def test_room_is_waited_for_until_half_the_budget_is_free():
    async with raw_to_peer(limits=Limits(queue_bytes=1_000_000)) as (raw, peer):
        for seq in range(90):
            assert peer.publish(event(seq, 10_000), epoch="e")
        waiting = asyncio.create_task(peer.room())
        await raw.receive()
        assert not waiting.done()
        for _ in range(5):
            await raw.receive()
        await waiting
        await peer.room()


async def test_room_is_not_waited_for_when_the_connection_is_gone():
    async with raw_to_peer(limits=Limits(queue_bytes=1000)) as (raw, peer):
        while peer.publish(event(1, 300_000), epoch="e"):
            pass
        waiting = asyncio.create_task(peer.room())
        await raw.pipe.close()
        await waiting
        assert not peer.publish(event(2), epoch="e")


async def test_an_event_of_twenty_megabytes_arrives_whole_while_calls_are_answered(peers):
    listener = Listener()
    async with peers(own={"on_notice": listener}) as (client, server):
        sent = [event(1), event(2, LONG), event(3)]

        async def publish() -> None:
            for one in sent:
                await server.room(len(one))
                assert server.publish(one, epoch="e")

        publishing = asyncio.create_task(publish())
        pings = 0
        while len(listener.events) < 3:
            assert await client.call(Ping()) == Pong()
            pings += 1
        await publishing
        assert listener.events == sent
        assert pings > 3


async def test_calls_and_answers_of_twenty_megabytes_arrive_whole_while_calls_are_answered(peers):
    async def send(params, call):
        return Accepted(len(params.text), "r")

    async def diff(params, call):
        return DiffText("y" * LONG)

    async with peers({SendMessage: send, GitDiff: diff}) as (client, _):
        op_id = "018f0000-0000-7000-8000-000000000001"
        sending = asyncio.create_task(client.call(SendMessage(op_id=op_id, text="x" * LONG)))
        asking = asyncio.create_task(client.call(GitDiff()))
        pings = 0
        while not (sending.done() and asking.done()):
            assert await client.call(Ping()) == Pong()
            pings += 1
        assert sending.result() == Accepted(LONG, "r")
        assert len(asking.result().text) == LONG
        assert pings > 3


async def test_a_long_call_may_be_cancelled_while_it_is_being_sent():
    here, there = memory_pipes()
    raw = Raw(there)
    async with Peer(here, opener=True) as peer:
        op_id = "018f0000-0000-7000-8000-000000000001"
        calling = asyncio.create_task(peer.call(SendMessage(op_id=op_id, text="x" * (2 << 20))))
        await raw.receive()
        calling.cancel()
        content = b""
        while isinstance(content, bytes):
            content, before = await raw.receive(), content
        assert content["method"] == "call.cancel"
        assert frame.unpack(before).last  # behind the call it cancels, not before it
        await raw.send({"jsonrpc": "2.0", "id": 1, "error": {"code": -32800, "message": ""}})
        with pytest.raises(asyncio.CancelledError):
            await calling


async def test_an_event_longer_than_the_budget_is_sent_when_nothing_else_waits():
    async with raw_to_peer(limits=Limits(queue_bytes=100_000)) as (raw, peer):
        assert peer.publish(event(1), epoch="e")
        assert not peer.publish(event(2, 1 << 20), epoch="e")
        await peer.room(1 << 20)
        assert peer.publish(event(2, 1 << 20), epoch="e")
        assert not peer.publish(event(3), epoch="e")
        waiting = asyncio.create_task(peer.room(100))
        assert (await raw.receive())["method"] == "events"
        while not frame.unpack(await raw.receive()).last:
            pass
        await waiting
        assert peer.publish(event(3), epoch="e")


async def test_an_event_longer_than_the_other_end_accepts_is_refused():
    async with raw_to_peer() as (_, peer):
        peer.other_limits = Limits(message_bytes=10_000)
        with pytest.raises(LimitExceeded) as caught:
            peer.publish(event(1, 10_000), epoch="e")
        assert caught.value.details["field"] == "event"


async def test_a_listener_that_fails_ends_the_connection(peers):
    bugs = []

    def broken(method, params):
        raise ZeroDivisionError

    own = {"on_notice": broken, "on_bug": lambda exc, incident: bugs.append((exc, incident))}
    async with peers(own=own) as (client, server):
        server.notify(SyncReset(reason="r", epoch="e", from_seq=1))
        assert (await client.wait_closed()).details["close_code"] == 1011
        assert (await server.wait_closed()).details["close_code"] == 1011
        assert isinstance(bugs[0][0], ZeroDivisionError)


async def test_notices_without_a_listener_and_unknown_ones_are_ignored():
    async with raw_to_peer() as (raw, peer):
        await raw.send({"jsonrpc": "2.0", "method": "draining", "params": {}})
        await raw.send({"jsonrpc": "2.0", "method": "hello", "params": {}})
        await raw.send({"jsonrpc": "2.0", "method": "upload", "params": {}})
        await raw.call(1, "ping")
        await raw.receive()
        assert peer.ignored["unknown notice"] == peer.ignored["call without id"] == 1


async def test_nothing_is_sent_after_the_end(peers):
    async with peers() as (client, _):
        await client.close()
        client.notify(Draining())
        client.publish_delta(b"{}")
        assert not client.publish(event(1), epoch="e")
