"""How connections end: everybody who waits hears why, and nothing is left behind."""

import asyncio

import pytest

from agent_sdk.protocol import frame
from agent_sdk.protocol.errors import ConnectionLost
from agent_sdk.protocol.methods.connection import Ping, Pong, SyncReset
from agent_sdk.protocol.methods.workspace import DiffText, GitDiff
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from tests.rpc.links import Raw, raw_to_peer

pytestmark = pytest.mark.timeout(30)


class Handler:
    """Waits until it is cancelled; its clean-up takes a while."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.abandoned = None

    async def __call__(self, params, call):
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            for _ in range(10):
                await asyncio.sleep(0)
            self.abandoned = call.abandoned
            raise


@pytest.mark.parametrize("side", [0, 1])
async def test_either_side_may_close_and_both_learn_why(peers, side):
    async with peers() as both:
        await both[side].close(4503, "the server is stopping")
        for peer in both:
            lost = await peer.wait_closed()
            assert lost.details == {"close_code": 4503, "reason": "the server is stopping"}


async def test_calls_under_way_hear_why_the_connection_ended(peers):
    handler = Handler()
    async with peers({GitDiff: handler}) as (client, server):
        client.other_limits = Limits(calls=1)
        calling = [asyncio.create_task(client.call(GitDiff())) for _ in range(3)]
        await handler.entered.wait()
        await server.close(4401, "no key")
        for call in calling:
            with pytest.raises(ConnectionLost) as caught:
                await call
            assert caught.value.details["close_code"] == 4401
        with pytest.raises(ConnectionError):
            await client.call(Ping())


@pytest.mark.parametrize("said", ["of the call", "of all calls"])
async def test_a_call_that_is_left_to_the_other_end_goes_on_there_when_it_is_cancelled(peers, said):
    entered, go, ended = (asyncio.Event() for _ in range(3))

    async def work(params, call):
        entered.set()
        await go.wait()
        ended.set()
        return DiffText("done")

    async with peers({GitDiff: work}) as (client, _):
        leave = (lambda: True) if said == "of the call" else None
        client.calls.leave = lambda: said == "of all calls"
        calling = asyncio.create_task(client.call(GitDiff(), leave=leave))
        await entered.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert await client.call(Ping()) == Pong()  # a cancellation would have come before it
        go.set()
        await ended.wait()
        assert await client.call(Ping()) == Pong()  # its answer came before, and nobody missed it


async def test_handlers_are_cancelled_and_waited_for(peers):
    handler = Handler()
    async with peers({GitDiff: handler}) as (client, server):
        calling = asyncio.create_task(client.call(GitDiff()))
        await handler.entered.wait()
        await client.close()
        await asyncio.wait({calling})
        assert isinstance(calling.exception(), ConnectionLost)
    assert handler.abandoned
    assert len(server._answers) == 0


async def test_leaving_closes_the_connection_and_waits_for_handlers_even_when_it_is_cancelled():
    handler = Handler()
    here, there = memory_pipes()
    entered = asyncio.Event()

    async def serve():
        async with Peer(there, {GitDiff: handler}, opener=False):
            entered.set()
            await asyncio.Event().wait()

    serving = asyncio.create_task(serve())
    await entered.wait()
    await Raw(here).call(1, "git.diff")
    await handler.entered.wait()
    serving.cancel()
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert handler.abandoned


async def test_an_error_in_the_body_closes_the_connection(peers):
    with pytest.raises(ZeroDivisionError):
        async with peers() as (client, server):
            raise ZeroDivisionError
    assert (await server.wait_closed()).details["close_code"] == 1000


async def test_what_waits_in_the_control_lane_is_sent_before_the_end(peers):
    seen = []
    async with peers(own={"on_notice": lambda method, _: seen.append(method)}) as (client, server):
        for _ in range(50):
            server.notify(
                SyncReset(reason="x" * 200_000, epoch="e", from_seq=1)
            )  # more than a transport takes
        await server.close(4503)
        await client.wait_closed()
    assert seen == ["sync.reset"] * 50


async def test_a_reader_that_does_not_read_cannot_keep_a_connection_open():
    here, there = memory_pipes()
    async with Peer(there, opener=False) as peer:
        for _ in range(20):
            peer.publish(b'"%b"' % (b"x" * 200_000), epoch="e")
            await asyncio.sleep(0)
        await peer.close(4408, "slow")
    with pytest.raises(ConnectionLost, match="4408"):
        while True:
            await here.receive()


async def test_a_handler_may_close_its_own_connection(peers):
    async def hang_up(params, call):
        await call.peer.close(4403, "not for you")
        await asyncio.Event().wait()

    async with peers({GitDiff: hang_up}) as (client, _):
        with pytest.raises(ConnectionLost, match="4403: not for you"):
            await client.call(GitDiff())


async def test_answers_nobody_reads_end_the_connection():
    async with raw_to_peer() as (raw, peer):
        flood = asyncio.create_task(ping_for_ever(raw))
        lost = await peer.wait_closed()
        assert lost.details == {"close_code": 4408, "reason": "answers are not read"}
        await asyncio.wait({flood})
        assert isinstance(flood.exception(), ConnectionLost)


async def ping_for_ever(raw):
    number = 0
    while True:
        number += 1
        await raw.call(number, "ping")


async def test_a_message_that_grows_too_long_ends_the_connection():
    async with raw_to_peer(limits=Limits(message_bytes=100_000)) as (raw, peer):
        for start in (0, 65536):
            await raw.send_binary(frame.piece(1, start, bytes(65536), last=False))
        lost = await peer.wait_closed()
        assert lost.details["close_code"] == 4413


async def test_refused_messages_do_not_end_the_connection():
    async with raw_to_peer() as (raw, _):
        for text in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"id":1}'):
            await raw.pipe.send(text, text=True)
        answers = [await raw.receive() for _ in range(6)]
        assert [answer["error"]["code"] for answer in answers] == [
            -32700,
            -32600,
            -32700,
            -32700,
            -32700,
            -32600,
        ]
        assert [answer["id"] for answer in answers] == [None] * 5 + [1]
        await raw.call(2, "ping")
        assert (await raw.receive())["result"] == {}


async def test_a_connection_that_breaks_has_no_close_code_of_anybody():
    here, there = memory_pipes()
    async with Peer(there, opener=False) as peer:
        await here.close(1006)
        assert (await peer.wait_closed()).details["close_code"] == 1006


async def test_closing_again_waits_for_the_first_close(peers):
    async with peers() as (client, _):
        await asyncio.gather(client.close(4000, "first"), client.close(4001, "second"))
        assert (await client.wait_closed()).details["close_code"] == 4000


async def test_a_peer_that_was_never_entered_can_be_closed():
    here, there = memory_pipes()
    await Peer(here, opener=True).close(4000)
    with pytest.raises(ConnectionLost, match="4000"):
        await there.receive()


async def test_a_thousand_connections_leave_nothing_behind():
    async def diff(params, call):
        return DiffText("")

    before = asyncio.all_tasks()
    for _ in range(1000):
        here, there = memory_pipes()
        async with Peer(here, opener=True) as client, Peer(there, {GitDiff: diff}, opener=False):
            assert await client.call(GitDiff()) == DiffText("")
            assert await client.call(Ping()) == Pong()
    assert asyncio.all_tasks() == before
