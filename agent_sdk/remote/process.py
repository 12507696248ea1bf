"""A Process and a Shell there."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from msgspec.structs import replace

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ConnectionLost
from agent_sdk.protocol.methods.workspace import (
    ProcessOutput,
    ProcessWait,
    ShellAnswer,
    ShellReset,
    ShellRun,
    ShellSend,
)
from agent_sdk.remote.feed import Feed
from agent_sdk.remote.link import Link, Until, persistent
from agent_sdk.remote.streams import Collector, collected, sent_by
from agent_sdk.remote.transfers import NO_CHANNEL
from agent_sdk.remote.verbs import Part
from agent_sdk.rpc.peer import Peer
from agent_sdk.workspace.contract import Exit, OutputName, Process, Shell, ShellResult
from agent_sdk.workspace.verbs import milliseconds


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
