"""A LocalWorkspace behind a Peer: every workspace method of the protocol mapped onto the contract.

It knows no transport and no policy; each handler is the contract's call plus the bytes that belong to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

from msgspec import convert
from msgspec.structs import replace

from agent_sdk.ids import sha256
from agent_sdk.protocol.errors import (
    ChangedDuringRead,
    ConnectionLost,
    InvalidParams,
    LimitExceeded,
    ProcessNotFound,
    TransferBroken,
)
from agent_sdk.protocol.methods.method import Done, Effect, Method
from agent_sdk.protocol.methods.workspace import (
    WORKSPACE,
    Count,
    Describe,
    DiffText,
    Download,
    Execute,
    Executed,
    FilesList,
    GitDiff,
    ProcessInput,
    ProcessList,
    ProcessOutput,
    ProcessStart,
    ShellAnswer,
    ShellReset,
    ShellRun,
    ShellSend,
    Started,
    Upload,
    UploadOffset,
)
from agent_sdk.protocol.results import (
    FileInfo,
    Transferred,
    WorkspaceInfo,
)
from agent_sdk.rpc.peer import Handler, Inbound
from agent_sdk.rpc.stream import ByteReader, ByteWriter
from agent_sdk.workspace.contract import ExecResult, Output, OutputName, ShellResult
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.process import LocalProcess
from agent_sdk.workspace.verbs import KEYS, arguments_of, seconds

INPUT_BYTES = 64 << 20
"""Of what one call is to read, and of all that wait together; the oldest gives way."""
KEPT_SECONDS = 600.0
"""For how long it waits for the rest."""


def workspace_handlers(workspace: LocalWorkspace) -> dict[type[Method[Any]], Handler]:
    """Return the handlers of all workspace methods.

    Calls that change something run once per op_id: one that is repeated attaches to the running call, or
    gets its result again, bytes included, over its own channels.
    """
    served = _Served(workspace)
    written: dict[type[Method[Any]], Handler] = {
        Describe: served.describe,
        Execute: served.execute,
        ProcessStart: served.start,
        ProcessList: lambda params, call: workspace.processes(),
        ProcessInput: served.feed,
        ProcessOutput: served.output,
        ShellRun: served.shell_run,
        ShellSend: served.shell_send,
        ShellReset: served.shell_reset,
        Upload: served.upload,
        UploadOffset: served.upload_offset,
        Download: served.download,
        FilesList: served.files_list,
        GitDiff: served.git_diff,
    }
    return {**dict.fromkeys(WORKSPACE, served.verb), **written}


class _Served:
    def __init__(self, workspace: LocalWorkspace) -> None:
        self._workspace = workspace
        self._operations = workspace.operations
        self._begun: dict[str, asyncio.Future[LocalProcess]] = {}
        """The processes of `execute` calls that are under way, by op_id."""
        self._inputs = Inputs()

    async def describe(self, params: Describe, call: Inbound) -> WorkspaceInfo:
        return replace(await self._workspace.describe(), operations=self._operations.under_way)

    # --- commands ---

    async def execute(self, params: Execute, call: Inbound) -> Executed:
        async with AsyncExitStack() as stack:
            writers: dict[OutputName, ByteWriter] = {}
            channels: tuple[tuple[OutputName, int, int], ...] = (
                ("stdout", params.stdout, params.stdout_since),
                ("stderr", params.stderr, params.stderr_since),
            )
            for name, channel, since in channels:
                if channel:
                    writers[name] = await stack.enter_async_context(call.writing(channel, since))
            stdin = await self._stdin(params, call)
            if params.follow and writers:
                return await self._follow(params, call, stdin, writers)
            result: ExecResult = await self._operations.run(params, lambda: self._run(params, stdin), call)
            for name, writer in writers.items():
                await _finish(writer, result.out if name == "stdout" else result.err)
            return _executed(result, with_text=not params.stdout)

    async def _stdin(self, params: Execute, call: Inbound) -> bytes | None:
        """Read what the command is to read; who repeats the call need not send it again."""
        if not params.stdin:
            return None
        async with call.reading(params.stdin) as reader, self._inputs.turn(params.op_id, call) as stdin:
            return None if params.op_id in self._operations else await stdin.read(reader)

    async def _follow(
        self,
        params: Execute,
        call: Inbound,
        stdin: bytes | None,
        writers: Mapping[OutputName, ByteWriter],
    ) -> Executed:
        """Send output while the command runs, from where the caller says; it is read from where it is kept."""
        begun = self._begun.setdefault(params.op_id, asyncio.get_running_loop().create_future())
        running = asyncio.ensure_future(self._operations.run(params, lambda: self._run(params, stdin), call))
        try:
            await asyncio.wait((running, begun), return_when=asyncio.FIRST_COMPLETED)
            process = begun.result() if begun.done() else None
            await asyncio.gather(
                *(self._send(process, running, writer, name) for name, writer in writers.items())
            )
            result: ExecResult = await running
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait((running,))
            raise
        finally:
            if not self._operations.is_running(params.op_id):
                self._begun.pop(params.op_id, None)
        sent = {name: writer.offset for name, writer in writers.items()}
        return _executed(result, sent=sent if result.status == "running" else {})

    async def _send(
        self,
        process: LocalProcess | None,
        running: asyncio.Future[ExecResult],
        writer: ByteWriter,
        stream: OutputName,
    ) -> None:
        """Send what a stream of a command says until the call is over; without the process what its result holds.
        Whoever does not want to read it does not disturb the command."""
        try:
            if process is None and (held := (await running).process_id):
                process = self._workspace.process(held)
            if process is not None:
                with suppress(ProcessNotFound):
                    said = process.chunks(writer.since, stream=stream, until=running)
                    async with aclosing(said) as chunks:
                        async for offset, data in chunks:
                            await writer.write_at(offset, data)
            result = await running
            await _finish(writer, result.out if stream == "stdout" else result.err)
        except (ConnectionLost, TransferBroken):
            return

    async def _run(self, params: Execute, stdin: bytes | None) -> ExecResult:
        begun = self._begun.setdefault(params.op_id, asyncio.get_running_loop().create_future())
        try:
            return await self._workspace.execute(
                _command(params.argv, params.shell),
                cwd=params.cwd,
                env=params.env,
                stdin=stdin,
                timeout=seconds(params.timeout_ms),
                yield_after=seconds(params.yield_after_ms),
                merge=params.merge,
                user=params.user,
                on_start=begun.set_result,
            )
        finally:
            self._begun.pop(params.op_id, None)

    async def start(self, params: ProcessStart, call: Inbound) -> Started:
        async def start() -> Started:
            options = arguments_of(params)
            command = _command(options.pop("argv"), options.pop("shell"))
            return Started((await self._workspace.start(command, **options)).id)

        return await self._operations.run(params, start, call)

    async def feed(self, params: ProcessInput, call: Inbound) -> Count:
        process = self._workspace.process(params.process_id)
        async with call.reading(params.channel) as reader:
            async for chunk in reader:
                await process.write_at(params.since + chunk.offset, chunk.data)
            await process.close_stdin()
            return Count(reader.size)

    async def output(self, params: ProcessOutput, call: Inbound) -> Count:
        process = self._workspace.process(params.process_id)
        said = process.chunks(params.since, stream=params.stream, follow=params.follow)
        async with call.writing(params.channel) as writer, aclosing(said) as chunks:
            async for offset, data in chunks:
                await writer.write_at(offset, data)
            await writer.finish(size=min(params.since, process.size(params.stream)))
            return Count(writer.offset)

    # --- shells ---

    async def shell_run(self, params: ShellRun, call: Inbound) -> ShellAnswer:
        shell = self._workspace.shell(params.name)
        return await self._in_shell(params, call, partial(shell.run, params.command))

    async def shell_send(self, params: ShellSend, call: Inbound) -> ShellAnswer:
        shell = self._workspace.shell(params.name)
        return await self._in_shell(params, call, partial(shell.send, _keys(params.keys), enter=params.enter))

    async def _in_shell(
        self, params: ShellRun | ShellSend, call: Inbound, act: Callable[..., Awaitable[ShellResult]]
    ) -> ShellAnswer:
        limits = {
            "timeout": seconds(params.timeout_ms),
            "quiet": seconds(params.quiet_ms),
            "until": _keys(params.until) or None,
        }
        async with AsyncExitStack() as stack:
            writer = None
            if params.channel:
                writer = await stack.enter_async_context(call.writing(params.channel, params.since))
            result = await self._operations.run(params, lambda: act(**limits), call)
            if writer is not None:
                await _finish(writer, result.output)
            return replace(
                convert(result, ShellAnswer, from_attributes=True),
                output_bytes=result.output.size,
                text=None if params.channel else result.output.text,
            )

    async def shell_reset(self, params: ShellReset, call: Inbound) -> Any:
        shell = self._workspace.shell(params.name)
        return await self._answer(params, call, shell.reset if params.fresh else shell.close)

    # --- files ---

    async def upload(self, params: Upload, call: Inbound) -> Transferred:
        async with call.reading(params.channel) as reader:
            await self._give_way(params.op_id)
            receive = partial(
                self._workspace.uploads.receive,
                *(params.op_id, params.path, reader, lambda: reader.trailer),
                since=params.since,
                size=params.size,
                mode=params.mode,
                unpack=params.unpack,
            )
            return await self._operations.run(params, receive, call)

    async def upload_offset(self, params: UploadOffset, call: Inbound) -> Count:
        if (stdin := await self._inputs.settled(params.op_id)) is not None:
            return Count(stdin.size if params.op_id in self._operations else len(stdin.come))
        await self._give_way(params.op_id)
        return Count(self._workspace.uploads.size(params.op_id))

    async def _give_way(self, op_id: str) -> None:
        # Also of one that has stopped to receive already: what it ends with is not the answer to this call.
        if self._workspace.uploads.give_way(op_id) or self._operations.is_running(op_id):
            await self._operations.settled(op_id)

    async def download(self, params: Download, call: Inbound) -> Transferred:
        files = self._workspace.files
        async with call.writing(params.channel, params.since) as writer:
            if params.pack:
                async with aclosing(files.packed(params.path, params.exclude)) as archive:
                    return await self._send_file(params, writer, archive, 0o755)
            async with files.read_stream(
                params.path, offset=params.offset, length=params.length, as_is=params.as_is
            ) as source:
                return await self._send_file(params, writer, source, source.mode)

    async def _send_file(
        self, params: Download, writer: ByteWriter, source: AsyncIterable[bytes], mode: int
    ) -> Transferred:
        digest, size = sha256(), 0
        async for data in source:
            digest.update(data)
            size += len(data)
            await writer.write_at(size - len(data), data)
        if size < params.since:
            raise ChangedDuringRead(f"the file became shorter: {params.path}", path=params.path)
        await writer.finish(digest.digest(), size=size)
        return Transferred(size, digest.hexdigest(), mode)

    async def files_list(self, params: FilesList, call: Inbound) -> list[FileInfo]:
        found = await self._workspace.files.list(params.path, depth=params.depth, hidden=params.hidden)
        return [info for info in found if params.after is None or info.path > params.after][: params.limit]

    async def git_diff(self, params: GitDiff, call: Inbound) -> DiffText:
        return DiffText(await self._workspace.git.diff(params.path, base=params.base))

    # --- all others ---

    async def verb(self, params: Method[Any], call: Inbound) -> Any:
        """Call the verb that the method is named after."""
        part, _, name = params.method.partition(".")
        verb = getattr(self._part(part, params), name)
        return await self._answer(params, call, lambda: verb(**arguments_of(params)))

    def _part(self, part: str, params: Any) -> Any:
        if part == "workspace":
            return self._workspace
        if (key := KEYS.get(part)) is None:
            return getattr(self._workspace, part)
        return getattr(self._workspace, part)(getattr(params, key))

    async def _answer(self, params: Method[Any], call: Inbound, verb: Callable[[], Awaitable[Any]]) -> Any:
        async def act() -> Any:
            result = await verb()
            return Done() if result is None else result

        return await (self._operations.run(params, act, call) if isinstance(params, Effect) else act())


def _command(argv: list[str] | None, shell: str | None) -> str | list[str]:
    if (argv is None) == (shell is None):
        raise InvalidParams("exactly one of $.params.argv and $.params.shell is needed")
    return argv if argv is not None else str(shell)


def _keys(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise InvalidParams("$.params.keys: each character is one byte, U+0000..U+00FF") from None


def _executed(
    result: ExecResult, *, with_text: bool = False, sent: Mapping[OutputName, int] = {}
) -> Executed:
    """The answer; `sent`: how much of each stream was sent, of a command that still writes."""
    return replace(
        convert(result, Executed, from_attributes=True),
        stdout_bytes=sent.get("stdout", result.out.size),
        stderr_bytes=sent.get("stderr", result.err.size),
        stdout_text=result.stdout if with_text else None,
        stderr_text=result.stderr if with_text else None,
    )


async def _finish(writer: ByteWriter, output: Output) -> None:
    """End a stream of output, with what a result holds of it: the tail at its own offset.

    Who does not want to read it any more gets the answer all the same.
    """
    with suppress(ConnectionLost, TransferBroken):
        await writer.write_at(0, output.head)
        await writer.write_at(output.size - len(output.tail), output.tail)
        await writer.finish(size=output.size)


class Input:
    """What has come for one call. One at a time reads on, whose turn it is."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.turn = asyncio.Lock()
        self.come = bytearray()
        self.size = 0
        """Of all of it, once all has come and was handed over."""
        self.end: asyncio.TimerHandle | None = None
        self._reader: ByteReader | None = None

    async def read(self, reader: ByteReader) -> bytes:
        """Return all of it, when the rest has come over this stream.

        Raises:
            LimitExceeded: it is too long.
            TransferBroken, ConnectionLost: it broke off; what has come is kept.
        """
        self._reader = reader
        async for offset, data in reader:
            self._begin_at(offset)
            self.come += data
            if (got := len(self.come)) > self._limit:
                self.come.clear()
                raise LimitExceeded(
                    f"stdin: at most {self._limit} bytes", field="stdin", limit=self._limit, got=got
                )
        self._begin_at(reader.size)
        whole, self.come = bytes(self.come), bytearray()
        self.size = len(whole)
        return whole

    def _begin_at(self, offset: int) -> None:
        if (missing := offset - len(self.come)) > 0:
            raise TransferBroken(f"stdin: {missing} bytes are missing at {len(self.come)}")
        del self.come[offset:]

    def let_go(self) -> None:
        """End the stream it still comes over, behind what has come."""
        if self._reader is not None:
            self._reader.fail(TransferBroken("another call goes on with it"))


class Inputs:
    """What calls are to read, by op_id, over one connection after the other: what has come waits for the rest."""

    def __init__(self, limit: int = INPUT_BYTES) -> None:
        self._limit = limit
        self._inputs: dict[str, Input] = {}

    async def settled(self, op_id: str) -> Input | None:
        """Return what has come for a call, when nothing more comes; None: nothing is known of it."""
        if (known := self._inputs.get(op_id)) is not None:
            known.let_go()
            async with known.turn:
                pass
        return known

    @asynccontextmanager
    async def turn(self, op_id: str, call: Inbound) -> AsyncIterator[Input]:
        """Read on, instead of whoever does so for this call now. A call that is cancelled on purpose leaves nothing."""
        known = self._inputs.pop(op_id, None) or Input(self._limit)
        self._inputs[op_id] = known  # behind the others
        known.let_go()
        if known.end is not None:
            known.end.cancel()
        try:
            async with known.turn:
                yield known
        except asyncio.CancelledError:
            if not call.abandoned:
                self._forget(op_id, known)
            raise
        finally:
            known.end = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget, op_id, known)
            self._bound()

    def _bound(self) -> None:
        for oldest in tuple(self._inputs):
            if sum(len(each.come) for each in self._inputs.values()) <= self._limit:
                return
            if not self._inputs[oldest].turn.locked():
                del self._inputs[oldest]

    def _forget(self, op_id: str, known: Input) -> None:
        if self._inputs.get(op_id) is known and not known.turn.locked():
            del self._inputs[op_id]
