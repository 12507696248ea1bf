"""One command there, with its input and its output, over one connection after the other."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from msgspec.structs import replace

from agent_sdk.protocol.methods.workspace import Execute
from agent_sdk.remote.streams import Collector, collected, with_output
from agent_sdk.remote.transfers import come
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, ByteWriter
from agent_sdk.workspace.contract import ExecResult, OnOutput, OutputName


class Command:
    """One command there: what it reads goes on behind what has come there, what it says behind what came here.

    A callback gets every byte once, in order, one piece at a time.
    """

    def __init__(self, call: Execute, stdin: bytes, on_output: OnOutput | None) -> None:
        self._call = call
        self._stdin = stdin
        self._stdin_come: int | None = None
        """How much of it the other end has; None: nothing was sent."""
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
                stdin=await stack.enter_async_context(self._feeding(peer)),
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
                answer = await with_output(peer.call(call), *hearing)
        return ExecResult(
            status=answer.status,
            exit_code=answer.exit_code,
            signal=answer.signal,
            duration=answer.duration,
            process_id=answer.process_id,
            reason=answer.reason,
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

    @asynccontextmanager
    async def _feeding(self, peer: Peer) -> AsyncIterator[int]:
        """Yield the channel that carries what it reads to the other end; 0 where there is nothing to carry."""
        if not self._stdin:
            yield 0
            return
        before = self._stdin_come
        self._stdin_come = 0 if before is None else await come(peer, self._call.op_id, before)
        async with peer.open_writer() as writer:
            await writer.skip_to(min(self._stdin_come, len(self._stdin)))
            feeding = asyncio.ensure_future(_write(writer, memoryview(self._stdin)[writer.offset :]))
            try:
                yield writer.channel
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)


async def _write(writer: ByteWriter, data: memoryview) -> None:
    await writer.write(data)
    await writer.finish()
