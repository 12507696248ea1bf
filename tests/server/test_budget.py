"""All clients together may have so many bytes on their way, and nobody can sit on them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.errors import Overloaded
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.budget import Budget
from tests.server.conftest import KEY
from tests.server.wire import BINARY, call, frame, request

MIB = 1 << 20
SMALL = {"limits": Limits(message_bytes=MIB), "max_incoming_bytes": 2 * MIB}


def post(size: int) -> bytes:
    headers = [("Host", "localhost"), ("Authorization", f"Bearer {KEY}"), ("Content-Length", str(size))]
    return request("POST", "/v1/rpc", headers)


def pieces(size: int, offset: int = 0) -> bytes:
    """An unfinished message of so many bytes, in frames."""
    piece = b" " * frames.PAYLOAD_BYTES
    return b"".join(
        frame(BINARY, frames.piece(1, at, piece, last=False))
        for at in range(offset, offset + size, frames.PAYLOAD_BYTES)
    )


async def test_bodies_that_do_not_fit_together_are_refused_before_they_are_read(start):
    async with start(**SMALL) as server, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await server.wire()) for _ in range(3)]
        body = call("ping") + b" " * (MIB - len(call("ping")))
        for wire in wires[:2]:
            await wire.send(post(MIB) + body[:100])
        answer = await wires[2].ask(post(MIB))
        while answer.status != 429:  # the others' requests may not have come yet
            answer = await wires[2].ask(post(MIB))
        assert (answer.kind, "limit 2097152 bytes" in answer.json["error"]["message"]) == ("overloaded", True)
        for wire in wires[:2]:
            assert (await wire.ask(body[100:])).status == 200
        async with await server.wire() as late:
            assert (await late.ask(post(MIB) + body)).status == 200


async def test_messages_that_are_never_finished_cannot_pin_more_than_that(start):
    async with start(**SMALL) as server, AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(server.session()) for _ in range(4)]
        for wire in sessions:
            await wire.send(pieces(15 * (MIB // 16)))
        ended = [asyncio.ensure_future(wire.ended()) for wire in sessions]
        done, others = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        assert {each.result().code for each in done} == {4429}
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def test_who_holds_much_for_long_gives_way_when_others_need_it():
    budget, gone = Budget(10, patience=0.0), []
    slow, quick = budget.share(lambda: gone.append("slow")), budget.share(lambda: gone.append("quick"))
    slow.take(8)
    quick.take(8)
    assert (gone, budget.used) == (["slow"], 8)
    quick.close()
    assert budget.used == 0


async def test_without_anybody_slow_who_comes_last_is_refused_and_what_it_held_is_given_back():
    budget = Budget(10)
    first, second = budget.share(), budget.share()
    first.take(6)
    second.take(4)
    with pytest.raises(Overloaded, match="limit 10 bytes"):
        second.take(1)
    second.close()
    first.take(4)
    first.give(99)
    assert budget.used == 0
