"""The input of a process there: every byte goes in once, over however many connections it takes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from agent_sdk.protocol.errors import AgentServerError, ConnectionLost, ProcessNotFound
from agent_sdk.protocol.methods.workspace import Count, ProcessInput, ProcessList
from agent_sdk.remote.link import Link, ask, passed
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteWriter

KEPT_BYTES = 4 << 20
"""What was sent and may have to be sent again: more than the windows of all streams on the way hold together."""


class Feed:
    """One byte stream at a time; the process knows how much of all its input it got, and skips that."""

    def __init__(self, link: Link, process_id: str) -> None:
        self._link = link
        self._id = process_id
        self._turn = asyncio.Lock()
        self._stream: _Stream | None = None
        self._kept: deque[bytes] = deque()
        self._first = 0
        self._end = 0
        self._sent = 0
        self._begun = False
        self._finished = False
        self._resending: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Write to the command's input, as Process.write does. Cancelling may leave a part of `data` written."""
        async with self._turn:
            await self._begin()
            before, self._end = self._end, self._end + len(data)
            self._kept.append(data)
            try:
                await self._flush()
            except BaseException:
                self._cut(before)
                raise
            self._forget()

    async def finish(self) -> None:
        """End the command's input, as Process.close_stdin does."""
        async with self._turn:
            if self._finished:
                return
            await self._begin()
            said = False
            while not self._finished:
                stream = await self._flush()
                try:
                    await stream.finish()
                    self._finished = True
                except ConnectionLost:
                    if stream.peer.lost is None:
                        raise
                    said = True
                except ProcessNotFound:
                    if not said:
                        raise
                    self._finished = True

    async def _begin(self) -> None:
        """Learn where its input stands. What is written to a process that has ended would be lost unnoticed."""
        if self._begun and not (self._stream and self._stream.answered):
            return
        found = [info for info in await ask(self._link, ProcessList()) if info.id == self._id]
        if not found or not found[0].running:
            raise ProcessNotFound(f"the process has ended or never was: {self._id}", process=self._id)
        if not self._begun:
            self._first = self._end = found[0].stdin_bytes
            self._begun = True

    async def _flush(self) -> _Stream:
        """Send what has not been sent, over another connection when the present one is lost."""
        while True:
            if self._stream is None or self._stream.peer.lost is not None:
                peer = (await self._link.linked()).peer
                try:
                    since = await self._come(peer)
                except AgentServerError as exc:
                    await passed(peer, exc)
                    continue
                self._stream = _Stream(peer, self._id, since, self._broken)
            stream = self._stream
            try:
                await stream.opened
                while stream.position < self._end:
                    await stream.write(self._kept_from(stream.position))
                return stream
            except ConnectionLost:
                if stream.peer.lost is None:
                    raise
            finally:
                self._sent = max(self._sent, stream.position)

    async def _come(self, peer: Peer) -> int:
        """Return how much the process has got, where a stream broke off; what is not kept any more it has."""
        if self._stream is None:
            return self._first
        found = [info for info in await peer.call(ProcessList()) if info.id == self._id]
        come = max(self._first, min(self._end, found[0].stdin_bytes if found else 0))
        peer.progress += come > self._stream.since
        return come

    def _broken(self) -> None:
        """A stream was lost, and what it carried may be: send it again although nobody writes."""
        if not self._finished:
            self._resending = asyncio.create_task(self._resend())

    async def _resend(self) -> None:
        with suppress(AgentServerError):  # whoever writes next hears of it
            async with self._turn:
                await self._flush()

    def _kept_from(self, position: int) -> memoryview:
        start = self._first
        for data in self._kept:
            if position < start + len(data):
                return memoryview(data)[position - start :]
            start += len(data)
        raise IndexError(position)

    def _forget(self) -> None:
        while self._kept and self._first + len(self._kept[0]) <= self._end - KEPT_BYTES:
            self._first += len(self._kept.popleft())

    def _cut(self, before: int) -> None:
        """Drop what of the last piece was never sent; what was may have gone in."""
        self._end = max(before, self._sent)
        self._kept[-1] = self._kept[-1][: self._end - before]


class _Stream:
    """One call that feeds the process; it lives as long as its byte stream."""

    def __init__(self, peer: Peer, process_id: str, since: int, broken: Callable[[], None]) -> None:
        self.peer = peer
        self.opened: asyncio.Future[ByteWriter] = asyncio.get_running_loop().create_future()
        self.since = since
        self._calling = asyncio.ensure_future(self._run(process_id))
        self._broken = broken
        self._calling.add_done_callback(self._ended)

    @property
    def answered(self) -> bool:
        """Whether the call is over."""
        return self._calling.done()

    @property
    def position(self) -> int:
        """Of the next byte, in all the input of the process."""
        return self.since + (self.opened.result().offset if self.opened.done() else 0)

    async def _run(self, process_id: str) -> Count:
        async with self.peer.open_writer() as writer:
            self.opened.set_result(writer)
            call = ProcessInput(process_id=process_id, channel=writer.channel, since=self.since)
            return await self.peer.call(call)

    def _ended(self, call: asyncio.Future[Count]) -> None:
        # Nobody may write again to hear of the end; then it does not matter how it came.
        error = None if call.cancelled() else call.exception()
        if isinstance(error, ConnectionLost) and self.peer.lost is not None:
            self._broken()

    async def write(self, data: memoryview) -> None:
        writing = asyncio.ensure_future((await self.opened).write(data))
        try:
            # A process that is gone answers the call; nobody would ever grant credit again.
            await asyncio.wait({writing, self._calling}, return_when=asyncio.FIRST_COMPLETED)
            if self._calling.done():
                await self._calling
                raise ProcessNotFound("the input of the process is closed")
            await writing
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def finish(self) -> None:
        if not self._calling.done():
            await (await self.opened).finish()
        await self._calling
