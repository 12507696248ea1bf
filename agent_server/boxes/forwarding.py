"""The workspace methods of a conversation, passed on to its box under the same op_id, with their bytes both ways.

What changes something is written down before it is sent and when it was answered. So a call that is
repeated, to whichever server, attaches to the one that runs in the box, or gets its answer again; and
when the box is gone, what had begun in it is unknown and never run again. StoredResult is what an
operation answered, as it is written down and given again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any, Self

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.idempotency import Asked, asked, did_nothing
from agent_sdk.ids import digest_of
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import (
    AgentServerError,
    Cancelled,
    ConnectionLost,
    ErrorObject,
    OutcomeUnknown,
    ProcessNotFound,
    StorageFull,
    WorkspaceLost,
    WorkspaceUnavailable,
    draining,
    from_wire,
    to_wire,
)
from agent_sdk.protocol.methods.method import Effect, Method, Stream, result_type
from agent_sdk.protocol.methods.workspace import (
    Describe,
    Execute,
    Executed,
    ProcessList,
    ProcessWait,
    ShellAnswer,
    ShellRun,
    ShellSend,
    Upload,
    UploadOffset,
)
from agent_sdk.protocol.results import Exit, RunningOperation, WorkspaceInfo
from agent_sdk.remote.link import Linked
from agent_sdk.rpc.peer import Inbound
from agent_server.boxes.forwarded_call import KEPT_BYTES, CallerStream, ForwardedCall
from agent_server.boxes.link import BoxLink
from agent_server.boxes.watch import is_silent

NOT_KEPT = "its output is not kept any more"


class StoredResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an operation answered, as it is written down."""

    answer: bytes | None = None
    """JSON."""
    error: ErrorObject | None = None
    output: dict[str, bytes] | None = None
    """By the field of its stream; None: it was too much to keep."""

    @classmethod
    def of(cls, params: Method[Any], answer: Any, output: Mapping[str, bytes | bytearray] | None) -> Self:
        """Write an answer down with the output that belongs to it, where it is not too long."""
        texts = {stream.text: getattr(answer, stream.text) or "" for stream in params.gives if stream.text}
        if sum(map(len, texts.values())) > KEPT_BYTES:
            gone = {name: None for name, text in texts.items() if text}
            answer, output = replace(answer, **gone), None
        kept = None if output is None else {name: bytes(data) for name, data in output.items()}
        return cls(answer=msgspec.json.encode(answer), output=kept)

    @classmethod
    def of_error(cls, error: AgentServerError) -> Self:
        """Write down that it failed, and how."""
        return cls(error=to_wire(error))

    @classmethod
    def read(cls, written: bytes) -> Self:
        """The opposite of `written`."""
        return msgspec.msgpack.decode(written, type=cls)

    @property
    def whole(self) -> bool:
        """Whether all is here that a repeated call gets."""
        return self.answer is None or self.output is not None

    def written(self) -> bytes:
        """Return it as bytes."""
        return msgspec.msgpack.encode(self)

    async def give(self, params: Effect[Any], streams: Mapping[str, CallerStream]) -> Any:
        """Answer a repeated call: with its bytes over its own streams, or as text where it has none.

        Raises:
            AgentServerError: the operation failed with it.
        """
        if self.error is not None:
            raise from_wire(self.error)
        assert self.answer is not None
        answer: Any = msgspec.json.decode(self.answer, type=result_type(type(params)))
        for stream in (stream for stream in params.gives if stream.text):
            field, size = stream.channel, getattr(answer, stream.size)
            data = self._bytes(answer, stream)
            if isinstance(answer, Executed) and data is None and size:
                answer = replace(answer, reason=answer.reason or NOT_KEPT)
            if field in streams:
                await streams[field].pass_on(0, data or b"")
                await streams[field].finish(size)
            else:
                text = None if data is None or answer.status == "unknown" else data.decode(errors="replace")
                answer = replace(answer, **{stream.text: text})
        return answer

    def _bytes(self, answer: Any, stream: Stream) -> bytes | None:
        """Return the output that is kept; None: there was some, and it is not."""
        if (text := getattr(answer, stream.text)) is not None:
            return str(text).encode()
        if not getattr(answer, stream.size):
            return b""
        return None if self.output is None else self.output.get(stream.channel)


LOST = "the box was lost; whether it was done is not known"


class ForwardedCalls:
    """The workspace methods of a conversation, passed on to its box; one for all its connections."""

    def __init__(self, conversation: str, link: BoxLink, log: EventLog) -> None:
        self._link = link
        self._operations = log.operations(conversation)
        self._running: dict[str, list[ForwardedCall]] = {}
        self._beginning: Counter[str] = Counter()
        """Calls whose intent is being written down, by op_id."""
        self._closed = False
        self._left: dict[str, RunningOperation] = {}
        """What a former server has begun in the box that survived it."""

    def __repr__(self) -> str:
        return f"<ForwardedCalls to {self._link!r}: {len(self._running)} operations>"

    def answer(self, params: Method[Any], call: Inbound) -> Awaitable[Any]:
        """Answer a workspace method."""
        match params:
            case Effect():
                return self._effect(params, call)
            case Describe():
                return self._describe(params, call)
            case UploadOffset():
                return self._offset(params, call)
        return self._look(params, call)

    async def open(self) -> None:
        """Find out what a former server has begun."""
        for known in await self._operations.begun():
            if self._link.survived and known.instance == self._link.instance:
                self._left[known.op_id] = RunningOperation(op_id=known.op_id, method=known.method)

    @property
    def busy(self) -> bool:
        """Whether something passes through."""
        return bool(self._running)

    async def operations(self) -> tuple[RunningOperation, ...]:
        """Return the operations under way, oldest first; also those to which nobody has come back yet."""
        if self._left:
            with suppress(AgentServerError):  # the box does not answer just now
                known = await self._link.operations()
                self._left = {op_id: left for op_id, left in self._left.items() if op_id in known}
        passing = {
            op_id: RunningOperation(op_id=op_id, method=runs[0].params.method)
            for op_id, runs in self._running.items()
        }
        return tuple({**self._left, **passing}.values())

    async def close(self) -> None:
        """Let go of what runs; it goes on in the box, and whoever repeats it attaches to it."""
        self._closed = True
        if runs := [run for runs in self._running.values() for run in runs]:
            self._link.owing = True
            for run in runs:
                run.let_go = not run.task.cancelling()  # what its caller cancels is to end in the box
            await _stop(runs)

    # --- what changes nothing ---

    async def _look(self, params: Method[Any], call: Inbound) -> Any:
        if isinstance(params, ProcessList) and not (self._link.is_running or self._link.survived):
            return []
        try:
            async with ForwardedCall(params, call) as forwarded:
                return await self._through(forwarded, await self._link.linked())
        except OutcomeUnknown:
            if isinstance(params, ProcessWait):
                return Exit(status="unknown", reason=LOST)
            raise WorkspaceLost("the box was lost") from None
        except ProcessNotFound:
            if isinstance(params, ProcessWait) and await self._was_elsewhere(params.process_id):
                return Exit(status="unknown", reason=LOST)
            raise

    async def _was_elsewhere(self, process_id: str) -> bool:
        """Whether a process ran in a box that is gone."""
        instance = await self._operations.instance_of(process_id)
        return instance not in (None, self._link.instance)

    async def _describe(self, params: Describe, call: Inbound) -> WorkspaceInfo:
        return await self._link.describe(await self._look(params, call))

    async def _offset(self, params: UploadOffset, call: Inbound) -> Any:
        await self._end_upload(params.op_id)
        runs = self._running.get(params.op_id, ())
        if left := [task for run in runs if run.call.peer.lost is not None for task in run.coming]:
            await asyncio.wait(left)  # what has come goes in first
        return await self._look(params, call)

    async def _through(self, forwarded: ForwardedCall, linked: Linked) -> Any:
        """Pass a call on, and again when the connection to the box broke.

        Raises:
            OutcomeUnknown: the box is gone.
        """
        instance = linked.instance
        while True:
            try:
                return await forwarded.through(linked.peer)
            except ConnectionLost:
                if linked.peer.lost is None:
                    raise
            forwarded.broken = True
            again = await self._link.again(instance)
            if again is None:
                raise OutcomeUnknown(LOST)
            if forwarded.once:
                raise WorkspaceUnavailable("the connection to the box broke; call again")
            linked = again

    # --- what changes something ---

    async def _effect(self, params: Effect[Any], call: Inbound) -> Any:
        async with ForwardedCall(params, call) as run:
            op_id, run.instance = params.op_id, self._link.named()
            digest = digest_of(params.method, asked(params))
            self._beginning[op_id] += 1
            try:
                known = await self._operations.begin(Asked(op_id, digest, params.method, run.instance))
            finally:
                self._beginning[op_id] -= 1
                if not self._beginning[op_id]:
                    del self._beginning[op_id]
            if known is not None and known.answer is not None:
                stored = StoredResult.read(known.answer)
                if stored.whole or known.instance != run.instance:  # else the box still has the bytes
                    return await stored.give(params, run.streams)
            if isinstance(params, Upload):
                await self._end_upload(op_id)  # the rest of its bytes comes over this call
            if known is not None:
                runs = self._running.get(op_id)
                run.instance = runs[0].instance if runs else known.instance
            return await self._run(run, fresh=known is None or isinstance(params, Upload))

    async def _run(self, run: ForwardedCall, *, fresh: bool) -> Any:
        """Operate in the task of the call, which from now on goes on without its caller."""
        self._running.setdefault(run.params.op_id, []).append(run)
        run.call.goes_on = True
        try:
            return await self._operate(run, fresh=fresh)
        except asyncio.CancelledError:
            if not run.stopped:
                await self._cancel(run)
                raise
            run.task.uncancel()
            if self._closed:  # it was let go of: whoever repeats it attaches to it
                raise draining() from None
            raise Cancelled("the operation was cancelled by another caller") from None
        finally:
            self._ended(run)

    async def _operate(self, run: ForwardedCall, *, fresh: bool) -> Any:
        try:
            linked = await (self._link.linked() if fresh else self._link.again(run.instance))
            if linked is None:
                raise OutcomeUnknown(LOST, op_id=run.params.op_id)
            run.instance = linked.instance
            answer = await self._through(run, linked)
        except OutcomeUnknown as exc:
            answer = _unknown(run.params, exc)
        except AgentServerError as exc:
            if is_silent(exc):
                self._link.owing = True
            elif did_nothing(type(run.params), exc):
                await self._withdraw(run)
            else:
                await self._finish(run, StoredResult.of_error(exc))
            raise
        await self._finish(run, StoredResult.of(run.params, answer, run.kept))
        return answer

    async def _finish(self, run: ForwardedCall, stored: StoredResult) -> None:
        try:
            await self._operations.finish(run.params.op_id, stored.written())
        except StorageFull:  # it was done, and the box still knows
            self._link.owing = True

    async def _withdraw(self, run: ForwardedCall) -> None:
        """It did nothing, and may come again: nothing is left of it, so nothing must remember it."""
        run.in_vain = not run.broken
        op_id = run.params.op_id
        if self._beginning[op_id] or not all(other.in_vain for other in self._running[op_id]):
            return
        with suppress(StorageFull):
            await self._operations.withdraw(op_id)

    def _ended(self, run: ForwardedCall) -> None:
        runs = self._running[run.params.op_id]
        runs.remove(run)
        if not runs:
            del self._running[run.params.op_id]
        run.over.set_result(None)
        self._link.use()

    async def _cancel(self, run: ForwardedCall) -> None:
        """Its caller does not want it any more; those whose callers lost their connection want nothing either."""
        others = [other for other in self._running[run.params.op_id] if other is not run]
        lost = [other for other in others if other.call.peer.lost is not None]
        # One that was cancelled, too, waits for the others in its turn: not for it.
        await _stop([other for other in lost if not other.task.cancelling()])
        if self._running[run.params.op_id] == [run]:
            await self._finish(run, StoredResult.of_error(Cancelled("the call was cancelled")))

    async def _end_upload(self, op_id: str) -> None:
        """Let go of the bytes that still come for it. Where their caller is gone, what has come goes in first."""
        runs = [run for run in self._running.get(op_id, ()) if isinstance(run.params, Upload)]
        for run in runs:
            run.let_go = True
        await _stop([run for run in runs if run.call.peer.lost is None])
        if runs:
            await asyncio.wait([run.over for run in runs])


async def _stop(runs: list[ForwardedCall]) -> None:
    for run in runs:
        run.stop()
    if runs:
        await asyncio.wait([run.over for run in runs])


def _unknown(params: Effect[Any], exc: OutcomeUnknown) -> Any:
    match params:
        case Execute():
            return Executed(status="unknown", reason=LOST)
        case ShellRun() | ShellSend():
            return ShellAnswer(status="unknown")
    raise OutcomeUnknown(LOST, op_id=params.op_id) from None
