"""What calls are to read, over one stream after the other."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import LimitExceeded, TransferBroken
from agent_sdk.protocol.methods.workspace import Execute
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.workspace.service import Inputs


class Reader:
    """A caller of something that answers how many bytes it read."""

    def __init__(self, peer: Peer, inputs: Inputs) -> None:
        self._peer = peer
        self.inputs = inputs

    @asynccontextmanager
    async def given(self, op_id: str, data: bytes, *, since: int = 0, whole: bool = False):
        """The answer to a call that has been sent these bytes."""
        async with self._peer.open_writer() as writer:
            call = Execute(op_id=op_id, shell="cat", stdin=writer.channel)
            calling = asyncio.ensure_future(self._peer.call(call))
            await writer.write_at(since, data)
            if whole:
                await writer.finish(size=since + len(data))
            await writer.flushed()
            yield calling
        await asyncio.gather(calling, return_exceptions=True)

    async def come(self, op_id: str) -> int:
        known = await self.inputs.settled(op_id)
        return -1 if known is None else len(known.come)


@pytest.fixture
async def reader():
    inputs = Inputs(limit=5)

    async def read(params: Execute, call) -> str:
        async with call.reading(params.stdin) as stream, inputs.turn(params.op_id, call) as known:
            return {"status": "exited", "reason": (await known.read(stream)).decode()}

    here, there = memory_pipes()
    async with Peer(there, {Execute: read}, opener=False), Peer(here, opener=True) as peer:
        yield Reader(peer, inputs)


async def test_what_broke_off_goes_on_behind_what_has_come(reader):
    op_id = new_id()
    async with reader.given(op_id, b"abc"):
        pass
    assert await reader.come(op_id) == 3
    async with reader.given(op_id, b"far away", since=9) as calling:
        with pytest.raises(TransferBroken, match="6 bytes are missing at 3"):
            await calling
    async with reader.given(op_id, b"BCD", since=1):
        pass
    async with reader.given(op_id, b"e", since=4, whole=True) as calling:
        assert (await calling).reason == "aBCDe"
    assert await reader.come(op_id) == 0


async def test_whoever_comes_later_goes_on_instead_of_who_reads(reader):
    op_id = new_id()
    async with reader.given(op_id, b"abc") as first, reader.given(op_id, b"xy", whole=True) as second:
        with pytest.raises(TransferBroken, match="another call goes on with it"):
            await first
        assert (await second).reason == "xy"


async def test_a_shorter_one_leaves_nothing_of_a_longer_one(reader):
    op_id = new_id()
    async with reader.given(op_id, b"abc"):
        pass
    async with reader.given(op_id, b"", whole=True) as calling:
        assert (await calling).reason == ""


async def test_a_call_that_is_cancelled_leaves_nothing(reader):
    op_id = new_id()
    async with reader.given(op_id, b"abc") as calling:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    assert await reader.come(op_id) == -1


async def test_there_is_a_limit_for_one_and_for_all_that_wait(reader):
    first, second = new_id(), new_id()
    async with reader.given(first, b"123456") as calling:
        with pytest.raises(LimitExceeded, match="stdin: at most 5 bytes"):
            await calling
    assert await reader.come(first) == 0
    for op_id in (first, second):
        async with reader.given(op_id, b"abc"):
            pass
    assert [await reader.come(op_id) for op_id in (first, second)] == [-1, 3]
