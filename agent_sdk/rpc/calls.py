"""Calls both ways: those of ours that the other end has to answer, and those of the other end, each answered once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import cache, partial
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from agent_sdk.cancellation import shielded
from agent_sdk.protocol.codec import (
    UNAWAITED,
    Codec,
    Failure,
    Id,
    Request,
    Response,
    decode_params,
    id_in_flight,
    unknown_method,
)
from agent_sdk.protocol.errors import (
    AgentServerError,
    Cancelled,
    ConnectionLost,
    InternalError,
    LimitExceeded,
    Overloaded,
    TimedOut,
    from_wire,
    to_wire,
)
from agent_sdk.protocol.methods.connection import CancelCall, CancelOutcome, Ping, Pong
from agent_sdk.protocol.methods.method import Method, R, result_type
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.lanes import Lanes, Line
from agent_sdk.rpc.stream import ByteWriter, StreamTable

UNQUEUED = (CancelCall.method, Ping.method)
"""Small, answered at once, and needed when all else is stuck."""
CANCEL_SECONDS = 10.0
"""How long a cancelled call waits for its answer: a command gets TERM, 5 s, KILL."""
RETRY_AFTER_MS = 250
CANCELS = 16

AnyHandler = Callable[[Any, Any], Coroutine[Any, Any, Any]]
Leave = Callable[[], bool]
"""Asked when a call of ours is cancelled: whether it goes on at the other end."""
Watch = Callable[[Method[Any], "asyncio.Future[Any]"], None]
"""Called with a call of ours and what it waits for, its turn or its answer; may end the waiting with an exception."""


class OutboundCalls:
    """Who waits for which answer, and who waits to be allowed to call."""

    def __init__(self, codec: Codec, lanes: Lanes, streams: StreamTable, limits: Limits) -> None:
        """Make an empty table; `limits`: those of the other end."""
        self.limits = limits
        self.watch: Watch | None = None
        """Is told of each call of ours as it begins to wait."""
        self.leave: Leave = lambda: False
        """Asked where a call that is cancelled has no `leave` of its own: whether it is only forgotten."""
        self._codec = codec
        self._lanes = lanes
        self._streams = streams
        self._pending: dict[Id, asyncio.Future[Raw]] = {}
        self._unread: set[Id] = set()
        """Of `call.cancel` calls, whose answers say nothing new."""
        self._in_flight = 0
        self._queue: Line[asyncio.Future[None]] = Line()
        self._lost: ConnectionLost | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def use(self, limits: Limits) -> None:
        """From now on these are the limits of the other end."""
        self.limits = limits
        self._admit()

    async def within(self, seconds: float, params: Method[R], leave: Leave | None) -> R:
        """Call a method of the other end and wait no longer than this for the answer.

        Raises:
            TimedOut: there was none in time.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.call(params, leave)
        except AgentServerError:
            raise
        except TimeoutError:
            raise TimedOut(f"no answer to {params.method} within {seconds:g} s", seconds=seconds) from None

    async def call(self, params: Method[R], leave: Leave | None) -> R:
        """Call a method of the other end and wait for the answer."""
        writers = self._streams.writers(getattr(params, stream.channel) for stream in params.takes)
        is_counted = False
        try:
            if params.method not in UNQUEUED:
                if self._in_flight < self.limits.calls and self._queue.items is None:
                    self._in_flight += 1
                else:
                    await self._enter(params)
                is_counted = True
            if self._lost is not None:
                raise self._lost
            id, message = self._codec.request(params.method, params)
            if (got := len(message)) > (limit := self.limits.message_bytes):
                text = f"a call of more than {limit} bytes"
                raise LimitExceeded(text, field="message", limit=limit, got=got)
            future = self._pending[id] = asyncio.get_running_loop().create_future()
            is_long = False
            try:
                if self.watch is not None:
                    self.watch(params, future)
                is_long = self._lanes.put_message(message, partial(_announce, writers) if writers else None)
                answer = await future
            except asyncio.CancelledError:
                if future.cancelled() and self._lost is None and not (leave or self.leave)():
                    await self._cancel(id, is_long)
                raise
            finally:
                del self._pending[id]
        finally:
            if is_counted:
                self._leave()
            for writer in writers:
                writer.drop()
        try:
            return _decoder(type(params)).decode(answer)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise InternalError(f"the answer to {params.method} makes no sense: {exc}") from None

    def answer(self, message: Response | Failure) -> None:
        """An answer came."""
        future = self._pending.get(message.id)
        if future is None or future.done():
            if message.id in self._unread:
                self._unread.remove(message.id)
            else:
                self._codec.ignored[UNAWAITED] += 1
        elif isinstance(message, Response):
            future.set_result(message.result)
        else:
            future.set_exception(from_wire(message.error))

    def lose(self, lost: ConnectionLost) -> None:
        """No answer comes any more."""
        self._lost = lost
        for future in self._pending.values():
            if not future.done():
                future.set_exception(lost)
        self._admit()

    async def _cancel(self, id: Id, is_long: bool) -> None:
        """Ask the other end to give the call up and wait for the call's own answer, whatever it is."""
        answer = self._pending[id] = asyncio.get_running_loop().create_future()
        cancelling, message = self._codec.request(CancelCall.method, CancelCall(id=id))
        self._unread.add(cancelling)
        self._lanes.put_message(message, after_long=is_long)
        try:
            with shielded():
                await asyncio.wait({answer}, timeout=CANCEL_SECONDS)
        finally:
            if answer.done():
                answer.exception()  # seen: an error is as good an end as any
            else:
                self._unread.discard(cancelling)

    async def _enter(self, params: Method[Any]) -> None:
        """Wait in a queue for a place among the calls in flight, and take it."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        if self.watch is not None:
            self.watch(params, place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():
                self._leave()  # it was given to us at the same moment
            raise

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._queue.items is not None:
            self._admit()

    def _admit(self) -> None:
        while self._queue.items is not None and (
            self._in_flight < self.limits.calls or self._lost is not None
        ):
            place = self._queue.popleft()
            if not place.done():
                self._in_flight += 1
                place.set_result(None)


def _announce(writers: Iterable[ByteWriter]) -> None:
    for writer in writers:
        writer.announced()


@cache
def _decoder(method: type[Method[Any]]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(result_type(method))


class Table:
    """Who answers which method, found by the method's name; connections may share one."""

    __slots__ = ("by_name",)

    def __init__(self, handlers: Mapping[type[Method[Any]], AnyHandler]) -> None:
        self.by_name = {method.method: (method, handler) for method, handler in handlers.items()}


class Call(Protocol):
    """What a handler is told of its call."""

    task: asyncio.Task[None]
    """The handler, which answers by ending."""
    goes_on: bool
    """Whether the handler goes on when the connection is lost; it ends by itself then, and nobody waits for it."""
    answered: bool
    """Whether its answer is on its way."""


class InboundCalls:
    """Which calls run, by id, and who answers which method.

    A call counts until its answer leaves: so a caller that does not read its answers is limited, too.
    """

    def __init__(
        self,
        codec: Codec,
        lanes: Lanes,
        limits: Limits,
        *,
        context: Callable[[Id], Call],
        report: Callable[[BaseException], str],
    ) -> None:
        """Make an empty table.

        Args:
            codec: makes the messages.
            lanes: takes them.
            limits: ours.
            context: makes the second argument of a handler.
            report: is told of bugs and returns an incident id.
        """
        self.handlers: dict[str, tuple[type[Method[Any]], AnyHandler]] = {}
        """By the method's name."""
        self.longest = limits.message_bytes
        """The longest message the other end accepts, in bytes."""
        self._codec = codec
        self._lanes = lanes
        self._limit = limits.calls
        self._context = context
        self._report = report
        self._running: dict[Id, Call] = {}
        self._cancels: dict[Id, Id] = {}
        """The `call.cancel` calls that wait for what becomes of another, and of which."""
        self._lost = False

    def __len__(self) -> int:
        return len(self._running)

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """The handlers that do not go on without their caller."""
        return {call.task for call in self._running.values() if not call.goes_on}

    def use(self, handlers: Mapping[type[Method[Any]], AnyHandler] | Table) -> None:
        """From now on these answer."""
        self.handlers = (handlers if isinstance(handlers, Table) else Table(handlers)).by_name

    def request(self, message: Request) -> None:
        """A call came."""
        id = message.id
        try:
            if id in self._running or id in self._cancels:
                raise id_in_flight(id)
            if (found := self.handlers.get(message.method)) is not None:
                if len(self._running) >= self._limit:
                    text = f"{self._limit} calls are in flight"
                    raise Overloaded(text, limit=self._limit, retry_after_ms=RETRY_AFTER_MS)
                method, handler = found
                params = decode_params(method, message.params)
                call = self._context(id)
                call.task = asyncio.create_task(self._run(id, handler, params, call))
                self._running[id] = call
                call.task.add_done_callback(partial(self._done, id, call))
            elif message.method == CancelCall.method:
                self._cancel_call(id, decode_params(CancelCall, message.params).id)
            elif message.method == Ping.method:
                decode_params(Ping, message.params)
                self._lanes.put_message(self._codec.response(id, Pong()))
            else:
                raise unknown_method(message.method)
        except AgentServerError as exc:
            self._lanes.put_message(self._codec.failure(id, to_wire(exc)))

    def cancel(self, id: Id) -> bool:
        """Cancel a call that runs; False: no call of this id does."""
        call = self._running.get(id)
        return call is not None and call.task.cancel()

    def lose(self) -> None:
        """Cancel what is under way: nobody hears answers any more."""
        self._lost = True
        for task in self.tasks:
            task.cancel()

    def _cancel_call(self, id: Id, cancelled: Id) -> None:
        if not self.cancel(cancelled):
            self._lanes.put_message(self._codec.response(id, CancelOutcome("already_done")))
        elif list(self._cancels.values()).count(cancelled) >= CANCELS:
            raise Overloaded("the call is being cancelled", limit=CANCELS, retry_after_ms=RETRY_AFTER_MS)
        else:
            self._cancels[id] = cancelled

    async def _run(self, id: Id, handler: AnyHandler, params: Any, call: Call) -> None:
        """Run a handler and give its answer in the step in which it ends."""
        result = await handler(params, call)
        if self._lost:
            return
        message = self._codec.response(id, result)
        if (got := len(message)) > self.longest:
            text = f"an answer of more than {self.longest} bytes"
            raise LimitExceeded(text, field="result", limit=self.longest, got=got)
        call.answered = True
        self._lanes.put_message(message, partial(self._running.pop, id))

    def _done(self, id: Id, call: Call, task: asyncio.Task[None]) -> None:
        """A handler ended: answer its call where it failed, then those who wanted it cancelled."""
        error = Cancelled("the call was cancelled") if task.cancelled() else task.exception()
        if self._lost:
            self._running.pop(id, None)
            return
        if error is not None and not call.answered:
            message = self._failure(id, error)
            self._lanes.put_message(message, partial(self._running.pop, id))
        for waiting, cancelled in tuple(self._cancels.items()):
            if cancelled == id:
                del self._cancels[waiting]
                outcome = CancelOutcome("cancelled" if task.cancelled() else "not_cancellable")
                self._lanes.put_message(self._codec.response(waiting, outcome))

    def _failure(self, id: Id, exc: BaseException) -> bytes:
        if isinstance(exc, AgentServerError):
            try:
                return self._codec.failure(id, to_wire(exc))
            except Exception as bug:  # noqa: BLE001 - as above: it raised what JSON cannot say
                exc = bug
        return self._codec.failure(id, to_wire(InternalError("internal error", incident=self._report(exc))))
