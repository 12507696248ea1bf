"""One end of a connection, alive: calls and notices both ways, events, byte streams.

Theory of operation. A reader task takes frames from the pipe and never waits for anything else. What is
urgent is sent at once while nothing else is being sent and the pipe has room; for all else a writer task
takes frames from the lanes, and exists only while there are any. Every inbound call is a task; when it
ends, it is answered, exactly once. Nothing that puts something into the lanes waits. When the connection
ends, whoever waits for anything gets ConnectionLost with the close code, and handlers are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Self

from msgspec import Raw

from agent_sdk.cancellation import shielded
from agent_sdk.ids import new_id
from agent_sdk.protocol.codec import (
    DEFAULTS,
    Codec,
    Failure,
    Id,
    Notification,
    Request,
    Response,
    decode_params,
)
from agent_sdk.protocol.errors import (
    AgentServerError,
    BadBinaryHeader,
    ConnectionLost,
    InvalidParams,
    LimitExceeded,
    Overloaded,
)
from agent_sdk.protocol.frame import Credit, Data
from agent_sdk.protocol.methods.connection import CancelNotice, EventsNotice
from agent_sdk.protocol.methods.method import Method, Notice, R
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.budget import Budget
from agent_sdk.rpc.calls import InboundCalls, Leave, OutboundCalls, Table
from agent_sdk.rpc.lanes import Lanes
from agent_sdk.rpc.pipe import Pipe, lost
from agent_sdk.rpc.stream import ByteReader, ByteWriter, StreamTable

Handler = Callable[[Any, "Inbound"], Coroutine[Any, Any, Any]]
OnNotice = Callable[[str, Raw], None]
OnBug = Callable[[BaseException, str], None]

NOBODY = Table({})
FLUSH_SECONDS = 2.0
TURN_FRAMES = 64

PROTOCOL_ERROR, SLOW_READER, TOO_BIG, NO_ROOM, BUG = 4400, 4408, 4413, 4429, 1011


class Inbound:
    """One call that is being answered.

    Attributes:
        peer: the connection it came over.
        id: its JSON-RPC id.
        task: the handler.
        goes_on: whether the handler goes on when the connection is lost; else it is cancelled, and waited for.
        answered: whether its answer is on its way.
    """

    __slots__ = ("answered", "goes_on", "id", "peer", "task")

    def __init__(self, peer: Peer, id: Id) -> None:
        """Made by the peer."""
        self.peer = peer
        self.id = id
        self.task: asyncio.Task[None]
        self.goes_on = False
        self.answered = False

    @property
    def abandoned(self) -> bool:
        """Whether the connection has ended: a handler that is cancelled then is not told to undo what it does."""
        return self.peer.lost is not None

    def reading(self, channel: int) -> AbstractAsyncContextManager[ByteReader]:
        """The bytes the caller sends on its channel; leaving early tells the caller to stop.

        Entering raises InvalidParams when this is no channel that the caller has just opened.
        """
        return self.peer._streams.reading(channel)

    def writing(self, channel: int, since: int = 0) -> AbstractAsyncContextManager[ByteWriter]:
        """Send bytes to the caller on its channel; leaving without `finish` resets the stream.

        What lies before byte `since` the caller has got already: `write_at` leaves that out.

        Entering raises InvalidParams when this is no channel that the caller has just opened.
        """
        return self.peer._streams.writing(channel, since)


class Peer:
    """One end of a connection. Enter it to run it; leaving closes the pipe and waits for the handlers.

    Attributes:
        calls: those of ours that wait; its `watch` and `leave` may be set at any time.
        other_limits: what the other end accepts; set it once `initialize` told.
        progress: how much came of it that the next connection need not bring again: bytes of streams that came or were
            accepted, events, and what its users add: calls whose answer they have.
        ignored: how often something was ignored, by reason.
    """

    def __init__(
        self,
        pipe: Pipe,
        handlers: Mapping[type[Method[Any]], Handler] | Table = NOBODY,
        *,
        opener: bool,
        limits: Limits = DEFAULTS,
        strict: bool = False,
        on_notice: OnNotice | None = None,
        on_bug: OnBug | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Make an end that does nothing yet.

        Args:
            pipe: closed by the peer.
            handlers: who answers which method; may be replaced at any time. A Table can be shared.
            opener: whether this side opened the connection; it decides who numbers streams odd.
            limits: what this end accepts.
            strict: check nesting and repeated keys of what comes in: for the accepting side.
            on_notice: called with the method and the params of each known notice, in order, by the
                reader: it must not block. `$/cancelRequest` is not among them.
            on_bug: called with an unexpected exception and the incident id the other end was told;
                by default the event loop's exception handler gets it.
            budget: what holds messages that arrive in pieces; None: nobody counts them.
        """
        self._pipe = pipe
        self._limits = limits
        self._on_notice = on_notice
        self._on_bug = on_bug
        self._share = None if budget is None else budget.share(self._give_way)
        self._codec = Codec(limits, strict=strict, room=self._share)
        self._lanes = Lanes(limits.queue_bytes, self._begin_writing, self._send_now)
        self._streams = StreamTable(self._lanes, limits, opener=opener)
        self.calls = OutboundCalls(self._codec, self._lanes, self._streams, DEFAULTS)
        self._answers = InboundCalls(
            self._codec, self._lanes, limits, context=partial(Inbound, self), report=self._report
        )
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._lost: ConnectionLost | None = None
        self._ended: asyncio.Future[ConnectionLost] | None = None
        self.progress = 0
        self._frames_come = 0
        self._answers.use(handlers)

    @property
    def handlers(self) -> Mapping[type[Method[Any]], Handler]:
        """Who answers which method."""
        return {method: handler for method, handler in self._answers.handlers.values()}

    @handlers.setter
    def handlers(self, handlers: Mapping[type[Method[Any]], Handler]) -> None:
        self._answers.use(handlers)

    @property
    def other_limits(self) -> Limits:
        """What the other end accepts."""
        return self.calls.limits

    @other_limits.setter
    def other_limits(self, limits: Limits) -> None:
        limits = _sane(limits)
        self.calls.use(limits)
        self._lanes.use(limits)
        self._answers.longest = limits.message_bytes
        self._streams.other_window = limits.window_bytes

    @property
    def ignored(self) -> Mapping[str, int]:
        """How often something that cannot be answered was ignored, by reason."""
        return {**self._codec.ignored, "frame of an unknown stream": self._streams.unknown}

    @property
    def lost(self) -> ConnectionLost | None:
        """How the connection ended; None while it is up."""
        return self._lost

    def __repr__(self) -> str:
        state = "new" if self._reader is None else "closed" if self._lost is not None else "open"
        return f"<Peer {state}: {len(self._answers)} calls in, {len(self.calls)} calls out>"

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        self._begin_writing()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _until_done(asyncio.create_task(self._end()))

    def call(
        self, params: Method[R], *, timeout: float | None = None, leave: Leave | None = None
    ) -> Coroutine[Any, Any, R]:
        """Call a method of the other end and return what it answers.

        Waits in a queue while as many calls are in flight as the other end accepts (not `ping` and
        `call.cancel`). Cancelling asks the other end to cancel the call, waits for the call's answer
        (10 s at most), then raises CancelledError, unless `leave` says that the call goes on there.

        Args:
            params: the method's params; their class says which method.
            timeout: seconds; when they are over the call is cancelled in the same way.
            leave: asked when the call is cancelled: whether to forget it only; None: the `leave` of the peer is asked.

        Raises:
            TimedOut: after `timeout`, or the other end said so.
            ConnectionLost: the connection ended; whether the call took effect is unknown.
            AgentServerError: what the other end answered, same class as there.
        """
        if timeout is None:
            return self.calls.call(params, leave)
        return self.calls.within(timeout, params, leave)

    def open_reader(self) -> AbstractAsyncContextManager[ByteReader]:
        """A stream the other end writes to; put its `channel` into the params of a call."""
        return self._streams.open_reader()

    def open_writer(self) -> AbstractAsyncContextManager[ByteWriter]:
        """A stream to the other end; put its `channel` into the params of a call. Nothing is sent before that.

        Leaving without `finish` resets the stream.
        """
        return self._streams.open_writer()

    def notify(self, notice: Notice) -> None:
        """Send a notice ahead of events and bytes. Dropped when the connection has ended."""
        if self._lost is None:
            self._lanes.put_message(self._codec.notification(notice.method, notice))

    def publish(self, event: bytes, *, epoch: str) -> bool:
        """Send a durable event, in order, together with others that wait. Never waits.

        Args:
            event: JSON.
            epoch: of the log it is from.

        Returns:
            False when `limits.queue_bytes` of events wait already: the reader is too slow; close
            with 4408. Also False when the connection has ended.

        Raises:
            LimitExceeded: the other end does not accept messages that long.
        """
        if self._lost is not None:
            return False
        if (got := len(event) + 256) > (limit := self.calls.limits.message_bytes):
            raise LimitExceeded(f"an event of more than {limit} bytes", field="event", limit=limit, got=got)
        return self._lanes.put_event(event, epoch)

    def publish_delta(self, delta: bytes) -> None:
        """Send a transient delta (JSON) behind the events; dropped when half of the events' budget is used."""
        if self._lost is None:
            self._lanes.put_delta(b'{"jsonrpc":"2.0","method":"delta","params":{"delta":%b}}' % delta)

    async def room(self, size: int = 0) -> bool:
        """Wait until less than half of the events' budget is used and an event of `size` bytes fits.

        Returns False when the connection has ended or is being closed.
        """
        return await self._lanes.room(size)

    @property
    def sends_long_event(self) -> bool:
        """Whether an event that is longer than a frame is on its way, which may take long on a thin line."""
        return self._lanes.sends_long_event

    @property
    def frames_left(self) -> int:
        """How many frames the pipe has taken so far: whether the other end reads at all."""
        return self._lanes.frames_left

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Send what waits in the control lane (2 s at most), then close the connection, telling why.

        With 4408 nothing is waited for: who does not read cannot be told.

        May be called again, then it waits for the first to be done. Cancelling does not stop it.
        A handler that closes its own connection is cancelled at its next await.
        """
        await asyncio.shield(self._begin_close(code, reason))

    async def wait_closed(self) -> ConnectionLost:
        """Wait until the connection has ended, by whichever side; returns how."""
        await asyncio.shield(self.ended)
        return self.ended.result()

    @property
    def ended(self) -> asyncio.Future[ConnectionLost]:
        """Done when the connection has ended; do not cancel it."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
            if self._lost is not None:
                self._ended.set_result(self._lost)
        return self._ended

    # -- the connection's life

    async def _end(self) -> None:
        await self.close()
        tasks = self._answers.tasks | {task for task in (self._reader, self._writer) if task is not None}
        await asyncio.wait(tasks)

    def _begin_close(self, code: int, reason: str) -> asyncio.Task[None]:
        if self._closer is None:
            self._closer = asyncio.create_task(self._close(code, reason))
        return self._closer

    async def _close(self, code: int, reason: str) -> None:
        if self._lost is None and self._reader is not None and code != SLOW_READER:
            try:
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._lanes.flushed()
            except TimeoutError:
                pass  # a reader that does not read cannot be told
        self._lose(lost(code, reason))
        if self._writer is not None:
            self._writer.cancel()
        await self._pipe.close(code, reason[:100])
        if self._reader is not None:
            self._reader.cancel()  # a socket that lingers may have nothing to say for long

    def _lose(self, reason: ConnectionLost) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        if self._share is not None:
            self._share.close()
        self._lanes.closing = True
        self._lanes.wake_all()
        self.calls.lose(reason)
        self._streams.lose(reason)
        self._answers.lose()
        if self._ended is not None:
            self._ended.set_result(reason)

    def _give_way(self) -> None:
        self._begin_close(NO_ROOM, "a message took long to arrive, and others need the memory; send it again")

    def _send_now(self, frame: bytes, text: bool) -> bool:
        idle = self._writer is None and self._reader is not None and self._lost is None
        return idle and self._pipe.send_now(frame, text=text)

    def _begin_writing(self) -> None:
        if self._writer is None and self._reader is not None and self._lost is None:
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while (frame := self._lanes.next_frame()) is not None:
                await self._pipe.send(frame.data, text=frame.text)
            self._writer = None  # in the step that found nothing: what comes next begins anew
        except ConnectionLost as exc:
            self._lose(exc)
            self._begin_close(1000, "")
        except Exception as exc:  # noqa: BLE001 - the writer's boundary, like the reader's
            self._lose(lost(BUG, f"internal error {self._report(exc)}"))
            self._begin_close(BUG, "internal error")

    async def _read(self) -> None:
        code, reason = 1000, ""
        try:
            while True:
                frame, text = await self._pipe.receive()
                self._frames_come += 1
                self._take(frame, text)
                if self._lanes.control_is_full:
                    code, reason = SLOW_READER, "answers are not read"
                    break
                if self._frames_come % TURN_FRAMES == 0:
                    await asyncio.sleep(0)  # frames that are here already must not keep others waiting
        except ConnectionLost as exc:
            self._lose(exc)
        except BadBinaryHeader as exc:
            code, reason = PROTOCOL_ERROR, f"bad_binary_header: {exc}"
        except LimitExceeded as exc:
            code, reason = TOO_BIG, str(exc)
        except Overloaded as exc:
            code, reason = NO_ROOM, str(exc)
        except Exception as exc:  # noqa: BLE001 - the reader's boundary: a bug must not leave a dead connection open
            code, reason = BUG, f"internal error {self._report(exc)}"
        self._begin_close(code, reason)

    # -- what comes in

    def _take(self, frame: bytes, text: bool) -> None:
        try:
            message = self._codec.receive(frame, text=text)
        except (BadBinaryHeader, LimitExceeded, Overloaded):
            raise
        except AgentServerError as exc:
            self._lanes.put_message(self._codec.refusal(exc))
            return
        match message:
            case None:
                pass
            case Request():
                self._answers.request(message)
            case Response() | Failure():
                self.calls.answer(message)
            case Notification():
                self._notice(message)
            case _:
                self.progress += isinstance(message, Data | Credit)
                self._streams.receive(message)

    def _notice(self, message: Notification) -> None:
        self.progress += message.method == EventsNotice.method
        if message.method != CancelNotice.method:
            if self._on_notice is not None:
                self._on_notice(message.method, message.params)
            return
        try:
            self._answers.cancel(decode_params(CancelNotice, message.params).id)
        except InvalidParams:
            self._codec.ignored["illegible notice"] += 1

    def _report(self, exc: BaseException) -> str:
        incident = new_id()
        if self._on_bug is not None:
            self._on_bug(exc, incident)
        else:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"unexpected exception, incident {incident}", "exception": exc}
            )
        return incident


def _sane(limits: Limits) -> Limits:
    """What the other end says of itself, without values that nothing could be sent under."""
    return Limits(
        frame_bytes=max(limits.frame_bytes, 1024),
        message_bytes=limits.message_bytes,
        payload_bytes=max(limits.payload_bytes, 1024),
        calls=max(limits.calls, 1),
        window_bytes=max(limits.window_bytes, 0),
    )


async def _until_done(task: asyncio.Task[None]) -> None:
    """Wait for a task that must not be left behind, however often that is cancelled; then be cancelled."""
    cancelled: asyncio.CancelledError | None = None
    with shielded():
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as exc:
                cancelled = exc
    if cancelled is not None:
        raise cancelled
