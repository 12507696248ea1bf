"""Commands, processes and shells there. Every byte of input goes in once, over however many connections it takes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing

from msgspec import convert
from msgspec.structs import replace

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ConnectionLost, ProcessNotFound
from agent_sdk.protocol.methods.workspace import (
    Execute,
    ProcessInput,
    ProcessList,
    ProcessOutput,
    ProcessWait,
    ShellAnswer,
    ShellReset,
    ShellRun,
    ShellSend,
)
from agent_sdk.remote.link import Link, Part, Until, ask, persistent
from agent_sdk.remote.streams import (
    NO_CHANNEL,
    Arrived,
    Collector,
    Kept,
    collected,
    meanwhile,
    sent_by,
    with_bytes,
)
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import wake
from agent_sdk.rpc.stream import ByteReader, ByteWriter
from agent_sdk.workspace.contract import ExecResult, Exit, OnOutput, OutputName, Process, Shell, ShellResult
from agent_sdk.workspace.verbs import milliseconds


class Command:
    """One command there: what it reads goes on behind what has come there, what it says behind what came here.

    A callback gets every byte once, in order, one piece at a time.
    """

    def __init__(self, call: Execute, stdin: bytes, on_output: OnOutput | None) -> None:
        self._call = call
        self._stdin = stdin
        self._arrived = Arrived(call.op_id)
        self._on_output = on_output
        self._turn = asyncio.Lock()
        self._out = Collector()
        self._err = Collector()

    async def attempt(self, peer: Peer) -> ExecResult:
        """Ask for it over this connection, or attach to it."""
        async with AsyncExitStack() as stack:
            out = await stack.enter_async_context(peer.open_reader())
            err = await stack.enter_async_context(peer.open_reader())
            call = replace(
                self._call,
                stdin=await self._feed(peer, stack) if self._stdin else 0,
                stdout=out.channel,
                stderr=err.channel,
                follow=self._on_output is not None,
                stdout_since=self._out.position,
                stderr_since=self._err.position,
            )
            if self._on_output is None:
                answer = await collected(peer.call(call), (self._out, out), (self._err, err))
            else:
                hearing = self._hear("stdout", self._out, out), self._hear("stderr", self._err, err)
                answer = await with_bytes(peer.call(call), *hearing)
        return replace(
            convert(answer, ExecResult, from_attributes=True),
            out=self._out.output(answer.stdout_bytes),
            err=self._err.output(answer.stderr_bytes),
        )

    async def _hear(self, name: OutputName, collector: Collector, reader: ByteReader) -> None:
        async for chunk in reader:
            if (data := collector.add(chunk)) and self._on_output is not None:
                async with self._turn:
                    waiting = self._on_output(name, data)
                    if inspect.isawaitable(waiting):
                        await waiting

    async def _feed(self, peer: Peer, stack: AsyncExitStack) -> int:
        """Begin to send what it reads, and return the channel; a command need not read all of it."""
        writer = await stack.enter_async_context(peer.open_writer())
        writer.since = await self._arrived.ask(peer)

        async def feed() -> None:
            await writer.write_at(0, memoryview(self._stdin))
            await writer.finish(size=len(self._stdin))

        await stack.enter_async_context(meanwhile(feed()))
        return writer.channel


class Input:
    """The input of a process: one byte stream at a time. The process knows how much of all its input it got."""

    def __init__(self, link: Link, process_id: str) -> None:
        self._link = link
        self._id = process_id
        self._turn = asyncio.Lock()
        self._kept: Kept | None = None
        """Its end; None: nobody has asked where it stands."""
        self._sent = 0
        """What may have gone in: behind the last byte that was given to a connection."""
        self._since: int | None = None
        """Where the present stream begins; None: there was none."""
        self._sending: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self._flushed: asyncio.Future[None] | None = None
        self._is_ending = self._was_ended = self._finished = False

    async def write(self, data: bytes) -> None:
        """Write to the command's input, as Process.write does. Cancelling may leave a part of `data` written."""
        async with self._turn:
            kept = await self._begin()
            before = kept.end
            kept.add(data)
            try:
                await self._flush()
            except BaseException:
                kept.cut(max(before, self._sent))
                raise

    async def finish(self) -> None:
        """End the command's input, as Process.close_stdin does."""
        async with self._turn:
            if self._finished:
                return
            await self._begin()
            self._is_ending = True
            try:
                await asyncio.shield(await self._flush())
                self._finished = True
            finally:
                self._is_ending = self._finished

    async def _begin(self) -> Kept:
        """Learn where its input stands. What is written to a process that has ended would be lost unnoticed."""
        if self._kept is None or (self._sending is not None and self._sending.done()):
            found = [info for info in await ask(self._link, ProcessList()) if info.id == self._id]
            if not found or not found[0].running:
                raise ProcessNotFound(f"the process has ended or never was: {self._id}", process=self._id)
            if self._kept is None:
                self._kept = Kept(found[0].stdin_bytes)
        return self._kept

    async def _flush(self) -> asyncio.Task[None]:
        """Have all sent that is kept, and its end; return who sends, also over the next connection."""
        flushed = self._flushed = asyncio.get_running_loop().create_future()
        self._more.set()
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
            self._sending.add_done_callback(lambda sending: sending.cancelled() or sending.exception())
        await asyncio.wait({self._sending, flushed}, return_when=asyncio.FIRST_COMPLETED)
        if not flushed.done():
            await self._sending
            raise ProcessNotFound("the input of the process is closed")
        return self._sending

    async def _send(self) -> None:
        await persistent(self._link, self._attempt, changes_something=False)

    async def _attempt(self, peer: Peer) -> None:
        kept, was_ended = self._kept, self._was_ended
        assert kept is not None
        since = self._since = kept.first if self._since is None else await self._come(peer, kept, self._since)
        try:
            async with peer.open_writer() as writer, meanwhile(self._move(writer, kept, since)):
                await peer.call(ProcessInput(process_id=self._id, channel=writer.channel, since=since))
        except ProcessNotFound:
            if not was_ended:
                raise

    async def _come(self, peer: Peer, kept: Kept, before: int) -> int:
        """Return how much the process has got, where a stream broke off; what is not kept any more it has."""
        found = [info for info in await peer.call(ProcessList()) if info.id == self._id]
        come = max(kept.first, min(kept.end, found[0].stdin_bytes if found else 0))
        peer.progress += come > before
        return come

    async def _move(self, writer: ByteWriter, kept: Kept, position: int) -> None:
        while True:
            while piece := kept.at(position):
                position += len(piece)
                self._sent = max(self._sent, position)
                await writer.write(piece)
            if self._is_ending or self._was_ended:
                await writer.finish()
                self._was_ended = True
            wake(self._flushed)
            self._more.clear()
            await self._more.wait()


class RemoteProcess(Part, Process, part="process"):
    """A process there. All of it goes on over the next connection when one is lost."""

    def __init__(self, link: Link, key: str) -> None:
        super().__init__(link, key)
        self._input = Input(link, key)

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
        result = convert(answer, ShellResult, from_attributes=True)
        return replace(result, output=output.output(answer.output_bytes))


def _keys(until: bytes | None) -> str:
    return (until or b"").decode("latin-1")
