"""Calls of the other end that we have to answer: each exactly once, whatever becomes of its handler."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol

from agent_sdk.protocol.endpoint import Endpoint, Id, Request, decode_params, unknown_method
from agent_sdk.protocol.errors import (
    AgentServerError,
    BadId,
    Cancelled,
    ErrorObject,
    InternalError,
    LimitExceeded,
    Overloaded,
    to_wire,
)
from agent_sdk.protocol.methods.connection import CancelCall, CancelOutcome, Ping, Pong
from agent_sdk.protocol.methods.method import Method
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.lanes import Lanes

AnyHandler = Callable[[Any, Any], Awaitable[Any]]

RETRY_AFTER_MS = 250
CANCELS = 16


class Table:
    """Who answers which method, found by the method's name; connections may share one."""

    __slots__ = ("by_name",)

    def __init__(self, handlers: Mapping[type[Method[Any]], AnyHandler]) -> None:
        self.by_name = {method.method: (method, handler) for method, handler in handlers.items()}


class Call(Protocol):
    """What a handler is told of its call."""

    goes_on: bool
    """Whether the handler goes on when the connection is lost; it ends by itself then, and nobody waits for it."""


class Running:
    """A call whose answer has not left yet."""

    __slots__ = ("call", "cancels", "task")

    def __init__(self, task: asyncio.Task[Any], call: Call) -> None:
        """Make an entry for a handler that has just begun."""
        self.task = task
        self.call = call
        self.cancels: list[Id] = []
        """Ids of the `call.cancel` calls that wait for what becomes of it."""


class Answers:
    """Which calls run, by id, and who answers which method.

    A call counts until its answer leaves: so a caller that does not read its answers is limited, too.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        lanes: Lanes,
        limits: Limits,
        *,
        context: Callable[[Id], Call],
        report: Callable[[BaseException], str],
    ) -> None:
        """Make an empty table.

        Args:
            endpoint: makes the messages.
            lanes: takes them.
            limits: ours.
            context: makes the second argument of a handler.
            report: is told of bugs and returns an incident id.
        """
        self.handlers: dict[str, tuple[type[Method[Any]], AnyHandler]] = {}
        """By the method's name."""
        self.longest = limits.message_bytes
        """The longest message the other end accepts, in bytes."""
        self._endpoint = endpoint
        self._lanes = lanes
        self._limit = limits.calls
        self._context = context
        self._report = report
        self._running: dict[Id, Running] = {}
        self._lost = False

    def __len__(self) -> int:
        return len(self._running)

    @property
    def tasks(self) -> set[asyncio.Task[Any]]:
        """The handlers that do not go on without their caller."""
        return {running.task for running in self._running.values() if not running.call.goes_on}

    def use(self, handlers: Mapping[type[Method[Any]], AnyHandler] | Table) -> None:
        """From now on these answer."""
        self.handlers = (handlers if isinstance(handlers, Table) else Table(handlers)).by_name

    def request(self, message: Request) -> None:
        """A call came."""
        try:
            if message.method in self.handlers:
                self._start(message)
            elif message.method == CancelCall.method:
                self._cancel_call(message.id, decode_params(CancelCall, message.params))
            elif message.method == Ping.method:
                decode_params(Ping, message.params)
                self._respond(message.id, Pong())
            else:
                raise unknown_method(message.method)
        except AgentServerError as exc:
            self._refuse(message.id, to_wire(exc))

    def cancel(self, id: Id) -> Running | None:
        """Cancel a call that runs; None: no call of this id does."""
        call = self._running.get(id)
        if call is None or call.task.done():
            return None
        call.task.cancel()
        return call

    def lose(self) -> None:
        """Cancel what is under way: nobody hears answers any more."""
        self._lost = True
        for task in self.tasks:
            task.cancel()

    def _start(self, message: Request) -> None:
        if message.id in self._running:
            raise BadId("the answer to an earlier call of this id has not left yet")
        if len(self._running) >= self._limit:
            text = f"{self._limit} calls are in flight"
            raise Overloaded(text, limit=self._limit, retry_after_ms=RETRY_AFTER_MS)
        method, handler = self.handlers[message.method]
        params = decode_params(method, message.params)
        call = self._context(message.id)
        task = asyncio.create_task(_run(handler, params, call))
        self._running[message.id] = Running(task, call)
        task.add_done_callback(partial(self._done, message.id))

    def _cancel_call(self, id: Id, params: CancelCall) -> None:
        call = self.cancel(params.id)
        if call is None:
            self._respond(id, CancelOutcome("already_done"))
        elif len(call.cancels) >= CANCELS:
            raise Overloaded("the call is being cancelled", limit=CANCELS, retry_after_ms=RETRY_AFTER_MS)
        else:
            call.cancels.append(id)

    def _done(self, id: Id, task: asyncio.Task[Any]) -> None:
        """A handler ended: answer its call, then those who wanted it cancelled."""
        error = Cancelled("the call was cancelled") if task.cancelled() else task.exception()
        if self._lost:
            del self._running[id]
            return
        if error is None:
            self._answer(id, task.result())
        else:
            self._refuse(id, self._wire_error(error), last=True)
        outcome = CancelOutcome("cancelled" if task.cancelled() else "not_cancellable")
        for waiting in self._running[id].cancels:
            self._respond(waiting, outcome)

    def _answer(self, id: Id, result: Any) -> None:
        try:
            message = self._endpoint.response(id, result)
        except Exception as exc:  # noqa: BLE001 - the handler's boundary: it returned what JSON cannot say
            self._refuse(id, self._wire_error(exc), last=True)
            return
        if (got := len(message)) > self.longest:
            text = f"an answer of more than {self.longest} bytes"
            error = LimitExceeded(text, field="result", limit=self.longest, got=got)
            self._refuse(id, to_wire(error), last=True)
            return
        self._lanes.put_message(message, partial(self._running.pop, id))

    def _respond(self, id: Id, result: Any) -> None:
        """Answer a call that never ran as a task."""
        self._lanes.put_message(self._endpoint.response(id, result))

    def _refuse(self, id: Id, error: ErrorObject, *, last: bool = False) -> None:
        left = partial(self._running.pop, id) if last else None
        self._lanes.put_message(self._endpoint.failure(id, error), left)

    def _wire_error(self, exc: BaseException) -> ErrorObject:
        if isinstance(exc, AgentServerError):
            return to_wire(exc)
        return to_wire(InternalError("internal error", incident=self._report(exc)))


async def _run(handler: AnyHandler, params: Any, context: Any) -> Any:
    return await handler(params, context)
