"""One command there, with its input and its output, over one connection after the other."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from msgspec.structs import replace

from agent_sdk.protocol.errors import ConnectionLost, TransferBroken
from agent_sdk.protocol.methods import Execute, Executed
from agent_sdk.remote.streams import Collector, with_output
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.stream import ByteReader, ByteWriter
from agent_sdk.workspace import ExecResult, OnOutput, Output, OutputName


async def executed(peer: Peer, call: Execute, stdin: bytes) -> ExecResult:
    """Ask for a command over this connection, or attach to it; its output comes at its end."""
    async with _channels(peer, stdin) as (source, out, err):
        asked = replace(call, stdin=source, stdout=out.channel, stderr=err.channel)
        answer, (stdout, stderr) = await with_output(
            peer.call(asked), (out, err), lambda ended: (ended.stdout_bytes, ended.stderr_bytes)
        )
    return _result(answer, stdout, stderr)


async def followed(peer: Peer, call: Execute, stdin: bytes, heard: Heard) -> ExecResult:
    """The same, and hand over the output as it comes, from where it was heard to."""
    async with _channels(peer, stdin) as (source, out, err):
        asked = replace(
            call,
            stdin=source,
            stdout=out.channel,
            stderr=err.channel,
            stdout_since=heard.out.position,
            stderr_since=heard.err.position,
        )
        answer = await heard.listen(peer.call(asked), out, err)
    sizes = max(answer.stdout_bytes, heard.out.position), max(answer.stderr_bytes, heard.err.position)
    return _result(answer, heard.out.output(sizes[0]), heard.err.output(sizes[1]))


class Heard:
    """What a command said so far, handed to a callback as it came: every byte once, in order, one piece at a time."""

    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output
        self._turn = asyncio.Lock()
        self.out = Collector()
        self.err = Collector()

    async def listen(self, call: Coroutine[Any, Any, Executed], out: ByteReader, err: ByteReader) -> Executed:
        """Await a command and hand over the output that comes meanwhile.

        When the connection is lost, a callback that runs is waited for, so that it sees every byte once.
        """
        calling = asyncio.ensure_future(call)
        following = (
            asyncio.ensure_future(self._follow("stdout", self.out, out)),
            asyncio.ensure_future(self._follow("stderr", self.err, err)),
        )
        tasks: set[asyncio.Future[Any]] = {calling, *following}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failures = [task.exception() for task in tasks if task.done()]
            if any(isinstance(error, TransferBroken) for error in failures):
                await calling
            if any(isinstance(error, ConnectionLost) for error in failures):
                await asyncio.wait(tasks)
            for error in (calling.exception() if calling.done() else None, *failures):
                if error is not None:
                    raise error
            return calling.result()
        except asyncio.CancelledError as exc:
            calling.cancel(*exc.args)  # it says whether the command shall end, too
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, name: OutputName, collector: Collector, reader: ByteReader) -> None:
        async for chunk in reader:
            if data := collector.add(chunk):
                async with self._turn:
                    waiting = self._on_output(name, data)
                    if inspect.isawaitable(waiting):
                        await waiting


@asynccontextmanager
async def _channels(peer: Peer, stdin: bytes) -> AsyncIterator[tuple[int, ByteReader, ByteReader]]:
    async with AsyncExitStack() as stack:
        out = await stack.enter_async_context(peer.open_reader())
        err = await stack.enter_async_context(peer.open_reader())
        source = await stack.enter_async_context(_feed(peer, stdin))
        yield source, out, err


@asynccontextmanager
async def _feed(peer: Peer, data: bytes) -> AsyncIterator[int]:
    """Yield the channel that carries `data` to the other end; 0 where there is nothing to carry."""
    if not data:
        yield 0
        return
    async with peer.open_writer() as writer:
        feeding = asyncio.ensure_future(_write(writer, data))
        try:
            yield writer.channel
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def _write(writer: ByteWriter, data: bytes) -> None:
    await writer.write(data)
    await writer.finish()


def _result(answer: Executed, stdout: Output, stderr: Output) -> ExecResult:
    return ExecResult(
        status=answer.status,
        exit_code=answer.exit_code,
        signal=answer.signal,
        duration=answer.duration,
        process_id=answer.process_id,
        reason=answer.reason,
        out=stdout,
        err=stderr,
    )
