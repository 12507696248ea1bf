"""A Process and a Shell there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    ProcessNotFound,
    TimedOut,
    TransferBroken,
)
from agent_sdk.protocol.methods import (
    Count,
    ProcessInput,
    ProcessOutput,
    ProcessResize,
    ProcessSignal,
    ProcessWait,
    ShellAnswer,
    ShellReset,
    ShellRun,
    ShellSend,
)
from agent_sdk.remote.streams import milliseconds, pass_failure, with_output
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, ByteWriter
from agent_sdk.workspace import Exit, OutputName, ShellResult


class RemoteProcess:
    """See workspace.Process. Its input is one byte stream, opened by the first write."""

    def __init__(self, peer: Peer, process_id: str) -> None:
        self._peer = peer
        self.id = process_id
        self._input: _Input | None = None

    def __repr__(self) -> str:
        return f"<RemoteProcess {self.id}>"

    async def write(self, data: bytes) -> None:
        """See Process.write. Cancelling may leave a part of `data` written."""
        if self._input is None:
            self._input = _Input(self._peer, self.id)
        await self._input.write(data)

    async def close_stdin(self) -> None:
        """See Process.close_stdin."""
        if self._input is None:
            self._input = _Input(self._peer, self.id)
        await self._input.finish()

    async def output(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[bytes]:
        """See Process.output."""
        async for _, data in self.chunks(since, stream=stream, follow=follow):
            yield data

    async def chunks(
        self, since: int = 0, *, stream: OutputName = "stdout", follow: bool = True
    ) -> AsyncIterator[tuple[int, bytes]]:
        """See Process.chunks."""
        async with self._peer.open_reader() as reader:
            call = ProcessOutput(
                process_id=self.id, channel=reader.channel, stream=stream, since=since, follow=follow
            )
            calling = asyncio.ensure_future(self._peer.call(call))
            calling.add_done_callback(lambda done: pass_failure(done, reader))
            try:
                async for chunk in reader:
                    yield chunk.offset, chunk.data
                await calling
            except TransferBroken:
                await calling
                raise
            finally:
                calling.cancel()
                await asyncio.gather(calling, return_exceptions=True)

    async def signal(self, name: str) -> None:
        """See Process.signal."""
        await self._peer.call(ProcessSignal(op_id=new_id(), process_id=self.id, name=name))

    async def resize(self, *, rows: int, cols: int) -> None:
        """See Process.resize."""
        await self._peer.call(ProcessResize(process_id=self.id, rows=rows, cols=cols))

    async def wait(self, timeout: float | None = None) -> Exit:
        """See Process.wait."""
        return await self._peer.call(
            ProcessWait(process_id=self.id, timeout_ms=milliseconds("timeout", timeout))
        )


class _Input:
    """The stream that feeds a process; the call lives as long as the stream."""

    def __init__(self, peer: Peer, process_id: str) -> None:
        self._opened: asyncio.Future[ByteWriter] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()
        self._calling = asyncio.ensure_future(self._run(peer, process_id))
        # Nobody may write again to hear of the end; then it does not matter how it came.
        self._calling.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _run(self, peer: Peer, process_id: str) -> Count:
        try:
            # What is written to a process that has ended would be lost before the call is refused.
            await peer.call(ProcessWait(process_id=process_id, timeout_ms=1))
            raise ProcessNotFound("the process has ended", process=process_id)
        except TimedOut:
            pass
        except AgentServerError as exc:
            self._opened.set_exception(exc)
            raise
        async with peer.open_writer() as writer:
            call = asyncio.ensure_future(
                peer.call(ProcessInput(process_id=process_id, channel=writer.channel))
            )
            self._opened.set_result(writer)
            return await call

    async def write(self, data: bytes) -> None:
        writer = await self._opened
        writing = asyncio.ensure_future(writer.write(data))
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
        if self._closed.is_set():
            return
        self._closed.set()
        writer = await self._opened
        if not self._calling.done():
            await writer.finish()
        await self._calling


class RemoteShell:
    """See workspace.Shell."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer = peer
        self._name = name

    async def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        op_id: str | None = None,
    ) -> ShellResult:
        """See Shell.run."""
        if not command:
            raise InvalidParams("command must not be empty")
        async with self._peer.open_reader() as reader:
            call = ShellRun(
                op_id=op_id or new_id(),
                name=self._name,
                command=command,
                timeout_ms=milliseconds("timeout", timeout),
                quiet_ms=milliseconds("quiet", quiet),
                channel=reader.channel,
            )
            return await _shell_result(self._peer.call(call), reader)

    async def send(
        self,
        data: bytes,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        op_id: str | None = None,
    ) -> ShellResult:
        """See Shell.send."""
        async with self._peer.open_reader() as reader:
            call = ShellSend(
                op_id=op_id or new_id(),
                name=self._name,
                keys=data.decode("latin-1"),
                timeout_ms=milliseconds("timeout", timeout),
                quiet_ms=milliseconds("quiet", quiet),
                channel=reader.channel,
            )
            return await _shell_result(self._peer.call(call), reader)

    async def reset(self, *, op_id: str | None = None) -> None:
        """See Shell.reset."""
        await self._peer.call(ShellReset(op_id=op_id or new_id(), name=self._name))


async def _shell_result(call: Awaitable[ShellAnswer], reader: ByteReader) -> ShellResult:
    answer, (output,) = await with_output(call, (reader,), lambda ended: (ended.output_bytes,))
    return ShellResult(
        status=answer.status,
        output=output,
        exit_code=answer.exit_code,
        cwd=answer.cwd,
        full_output=answer.full_output,
    )
