"""One call on its way to a box, and its bytes on theirs: in order, at their offsets, under the credit of both ends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any, Self

from msgspec.structs import replace

from agent_sdk.protocol.errors import ConnectionLost, TransferBroken
from agent_sdk.protocol.methods import (
    Download,
    Execute,
    Executed,
    Method,
    ProcessInput,
    ProcessOutput,
    ShellAnswer,
    ShellRun,
    ShellSend,
    Upload,
)
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.pipe import DISCONNECTED
from agent_sdk.rpc.stream import ByteReader, ByteWriter

KEPT_BYTES = 64 << 10
"""Of the output of an operation, to be given again."""
INWARD: dict[type[Method[Any]], tuple[str, ...]] = {
    Execute: ("stdin",),
    ProcessInput: ("channel",),
    Upload: ("channel",),
}
OUTWARD: dict[type[Method[Any]], tuple[str, ...]] = {
    Execute: ("stdout", "stderr"),
    ShellRun: ("channel",),
    ShellSend: ("channel",),
    ProcessOutput: ("channel",),
    Download: ("channel",),
}


class Passage:
    """See the module's docstring. Enter it; it may be tried again over another connection to the same box."""

    def __init__(self, params: Method[Any], call: Inbound) -> None:
        self.let_go = False
        """Whether being cancelled leaves the call to the box, instead of cancelling it there."""
        self.once = any(getattr(params, field) for field in INWARD.get(type(params), ()))
        """Whether bytes of the caller belong to it, which cannot be sent again."""
        self.broken = False
        """Whether it was sent over a connection that broke, so that nobody knows how far it came."""
        self.kept: dict[str, bytearray] | None = {}
        """The output that passed, by field; None: more than is kept."""
        self._params = params
        self._call = call
        self._ways = {
            field: _Way(call, channel, getattr(params, f"{field}_since", 0))
            for field in OUTWARD.get(type(params), ())
            if (channel := getattr(params, field))
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for way in self._ways.values():
            await way.close()

    async def end_streams(self) -> None:
        """End the streams to a caller who follows them, where they are: nothing more comes."""
        if isinstance(self._params, Execute) and self._params.follow:
            for way in self._ways.values():
                await way.finish(0, b"")

    async def through(self, peer: Peer) -> Any:
        """Make the call over this connection and return its answer, when all its bytes have passed.

        Raises:
            ConnectionLost: the connection to the box ended.
            AgentServerError: what the box answered.
        """
        self.kept = {}
        async with AsyncExitStack() as stack:
            fields: dict[str, Any] = {}
            coming = await self._take_in(stack, peer, fields)
            going = await self._take_out(stack, peer, fields)
            calling = asyncio.ensure_future(peer.call(replace(self._params, **fields)))
            try:
                await asyncio.wait({calling})
                answer = calling.result()
                for field in expected(self._params, answer):
                    if field in going:
                        await going[field]
                return answer
            except asyncio.CancelledError:
                calling.cancel(DISCONNECTED if self.let_go else None)
                await asyncio.wait({calling})
                raise
            finally:
                pumps = [*coming, *going.values()]
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(calling, *pumps, return_exceptions=True)

    async def _take_in(
        self, stack: AsyncExitStack, peer: Peer, fields: dict[str, Any]
    ) -> list[asyncio.Task[None]]:
        pumps = []
        for field in INWARD.get(type(self._params), ()):
            if channel := getattr(self._params, field):
                reader = await stack.enter_async_context(self._call.reading(channel))
                both = AsyncExitStack()
                writer = await both.enter_async_context(peer.open_writer())
                fields[field] = writer.channel
                pumps.append(asyncio.create_task(self._bring_in(both, reader, writer)))
        return pumps

    async def _bring_in(self, both: AsyncExitStack, reader: ByteReader, writer: ByteWriter) -> None:
        """Pass the caller's bytes on. Where they break off, the box hears of it at once."""
        async with both:
            with suppress(TransferBroken, ConnectionLost):
                async for chunk in reader:
                    await writer.skip_to(chunk.offset)
                    await writer.write(chunk.data)
                await writer.skip_to(reader.size)
                await writer.finish(reader.trailer)

    async def _take_out(
        self, stack: AsyncExitStack, peer: Peer, fields: dict[str, Any]
    ) -> dict[str, asyncio.Task[None]]:
        pumps = {}
        for field, way in self._ways.items():
            reader = await stack.enter_async_context(peer.open_reader())
            fields[field] = reader.channel
            if 0 < way.since <= KEPT_BYTES:
                fields[f"{field}_since"] = 0  # to be kept whole
            pumps[field] = asyncio.create_task(self._bring_out(field, reader, way))
        return pumps

    async def _bring_out(self, field: str, reader: ByteReader, way: _Way) -> None:
        async for chunk in reader:
            self._keep(field, chunk.offset, chunk.data)
            await way.pass_on(chunk.offset, chunk.data)
        await way.finish(reader.size, reader.trailer)

    def _keep(self, field: str, offset: int, data: bytes) -> None:
        if self.kept is None or not hasattr(self._params, "op_id"):
            return
        kept = self.kept.setdefault(field, bytearray())
        if offset == len(kept) and sum(map(len, self.kept.values())) + len(data) <= KEPT_BYTES:
            kept += data
        else:
            self.kept = None


class _Way:
    """To a caller's stream, opened with the first bytes; a caller who is gone or wants no more holds nothing up."""

    def __init__(self, call: Inbound, channel: int, since: int) -> None:
        self._call = call
        self._channel = channel
        self.since = since
        self._stack = AsyncExitStack()
        self._writer: ByteWriter | None = None

    async def close(self) -> None:
        """Leave the caller's stream; one that is not finished is reset."""
        await self._stack.aclose()

    async def pass_on(self, offset: int, data: bytes) -> None:
        """Send what the caller has not got yet."""
        got = self.since if self._writer is None else max(self.since, self._writer.offset)
        if rest := data[max(0, got - offset) :]:
            with suppress(ConnectionLost, TransferBroken):
                writer = await self._opened()
                await writer.skip_to(offset + len(data) - len(rest))
                await writer.write(rest)

    async def finish(self, size: int, trailer: bytes) -> None:
        """End the stream at this size."""
        with suppress(ConnectionLost, TransferBroken):
            writer = await self._opened()
            await writer.skip_to(max(size, writer.offset))
            await writer.finish(trailer)

    async def _opened(self) -> ByteWriter:
        if self._writer is None:
            self._writer = await self._stack.enter_async_context(self._call.writing(self._channel))
        return self._writer


def expected(params: Method[Any], answer: Any) -> tuple[str, ...]:
    """Return the fields whose streams the box opens with this answer; one without bytes may stay closed."""
    match answer:
        case Executed(stdout_bytes=out, stderr_bytes=err):
            follow = isinstance(params, Execute) and params.follow
            return tuple(name for name, size in (("stdout", out), ("stderr", err)) if size or follow)
        case ShellAnswer(output_bytes=size):
            return ("channel",) if size else ()
        case _:
            return OUTWARD.get(type(params), ())
