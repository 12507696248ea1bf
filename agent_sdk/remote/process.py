"""A Process and a Shell there. Every byte of input goes in once, over however many connections it takes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress

from msgspec.structs import replace

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, ConnectionLost, ProcessNotFound
from agent_sdk.protocol.methods.workspace import (
    Count,
    ProcessInput,
    ProcessList,
    ProcessOutput,
    ProcessWait,
    ShellAnswer,
    ShellReset,
    ShellRun,
    ShellSend,
)
from agent_sdk.remote.link import Link, Until, ask, passed, persistent
from agent_sdk.remote.streams import Collector, collected, sent_by
from agent_sdk.remote.transfers import NO_CHANNEL
from agent_sdk.remote.verbs import Part
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteWriter
from agent_sdk.workspace.contract import Exit, OutputName, Process, Shell, ShellResult
from agent_sdk.workspace.verbs import milliseconds

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


class RemoteProcess(Part, Process, part="process"):
    """A process there. All of it goes on over the next connection when one is lost."""

    def __init__(self, link: Link, key: str) -> None:
        super().__init__(link, key)
        self._input = Feed(link, key)

    def __repr__(self) -> str:
        return f"<RemoteProcess {self.id}>"

    @property
    def id(self) -> str:
        return self._key

    async def write(self, data: bytes) -> None:
        """Write to its standard input, as Process.write says. Cancelling may leave a part of `data` written."""
        await self._input.write(data)

    async def close_stdin(self) -> None:
        await self._input.finish()

    async def output(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[bytes]:
        async with aclosing(self.chunks(since, stream=stream, follow=follow)) as chunks:
            async for _, data in chunks:
                yield data

    async def chunks(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        position = since
        while True:
            peer = (await self._link.linked()).peer
            call = ProcessOutput(
                process_id=self.id, channel=NO_CHANNEL, stream=stream, since=position, follow=follow
            )
            try:
                async with sent_by(peer, call) as (reader, _):
                    async for chunk in reader:
                        position = chunk.offset + len(chunk.data)
                        yield chunk
                return
            except ConnectionLost:
                if peer.lost is None:
                    raise

    async def wait(self, timeout: float | None = None) -> Exit:
        milliseconds("timeout", timeout)
        link = Until(self._link, timeout)

        async def waited(peer: Peer) -> Exit:
            left = milliseconds("timeout", link.left)
            return await peer.call(ProcessWait(process_id=self.id, timeout_ms=left))

        return await persistent(link, waited, changes_something=False)


class RemoteShell(Part, Shell, part="shell"):
    """A persistent shell there."""

    async def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        until: bytes | None = None,
        op_id: str | None = None,
    ) -> ShellResult:
        return await self._answer(
            ShellRun(
                op_id=op_id or new_id(),
                name=self._key,
                command=command,
                timeout_ms=milliseconds("timeout", timeout),
                quiet_ms=milliseconds("quiet", quiet),
                until=_keys(until),
            )
        )

    async def send(
        self,
        data: bytes,
        *,
        enter: bool | None = False,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        until: bytes | None = None,
        op_id: str | None = None,
    ) -> ShellResult:
        return await self._answer(
            ShellSend(
                op_id=op_id or new_id(),
                name=self._key,
                keys=data.decode("latin-1"),
                enter=enter,
                timeout_ms=milliseconds("timeout", timeout),
                quiet_ms=milliseconds("quiet", quiet),
                until=_keys(until),
            )
        )

    async def close(self, *, op_id: str | None = None) -> None:
        await self._ask(ShellReset(op_id=op_id or new_id(), name=self._key, fresh=False))

    async def _answer(self, call: ShellRun | ShellSend) -> ShellResult:
        output = Collector()

        async def answered(peer: Peer) -> ShellAnswer:
            async with peer.open_reader() as reader:
                asked = replace(call, channel=reader.channel, since=output.position)
                return await collected(peer.call(asked), (output, reader))

        answer = await persistent(self._link, answered)
        return ShellResult(
            status=answer.status,
            output=output.output(answer.output_bytes),
            exit_code=answer.exit_code,
            cwd=answer.cwd,
            full_output=answer.full_output,
            full_output_lacks=answer.full_output_lacks,
            reason=answer.reason,
        )


def _keys(until: bytes | None) -> str:
    return (until or b"").decode("latin-1")
