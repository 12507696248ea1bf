"""Calls of ours that the other end has to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
from msgspec import Raw

from agent_sdk.protocol.endpoint import Endpoint, Failure, Id, Response
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    InternalError,
    LimitExceeded,
    TimedOut,
    from_wire,
)
from agent_sdk.protocol.methods.connection import CancelCall, Ping
from agent_sdk.protocol.methods.method import Method, R, result_type
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.lanes import Lanes, Line
from agent_sdk.rpc.shield import shielded

UNQUEUED = (CancelCall.method, Ping.method)
"""Small, answered at once, and needed when all else is stuck."""
CANCEL_SECONDS = 10.0
"""How long a cancelled call waits for its answer: a command gets TERM, 5 s, KILL."""

Leave = Callable[[], bool]
"""Asked when a call of ours is cancelled: whether it goes on at the other end."""
Watch = Callable[[Method[Any], "asyncio.Future[Any]"], None]
"""Called with a call of ours and what it waits for, its turn or its answer; may end the waiting with an exception."""


class Calls:
    """Who waits for which answer, and who waits to be allowed to call."""

    def __init__(self, endpoint: Endpoint, lanes: Lanes, limits: Limits) -> None:
        """Make an empty table; `limits`: those of the other end."""
        self.limits = limits
        self.watch: Watch | None = None
        self.leave: Leave = lambda: False
        """Asked where a call has no `leave` of its own."""
        self._endpoint = endpoint
        self._lanes = lanes
        self._pending: dict[Id, asyncio.Future[Raw]] = {}
        self._in_flight = 0
        self._queue: Line[asyncio.Future[None]] = Line()
        self._lost: ConnectionLost | None = None

    def __len__(self) -> int:
        return len(self._pending)

    def use(self, limits: Limits) -> None:
        """From now on these are the limits of the other end."""
        self.limits = limits
        self._admit()

    async def call(self, params: Method[R], timeout: float | None, leave: Leave | None) -> R:
        """Call a method of the other end and wait for the answer."""
        if timeout is None:
            return await self._call(params, leave)
        try:
            async with asyncio.timeout(timeout):
                return await self._call(params, leave)
        except AgentServerError:
            raise
        except TimeoutError:
            raise TimedOut(f"no answer to {params.method} within {timeout:g} s", seconds=timeout) from None

    def answer(self, message: Response | Failure) -> None:
        """An answer came."""
        future = self._pending.get(message.id)
        if future is None or future.done():
            return
        if isinstance(message, Response):
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

    async def _call(self, params: Method[R], leave: Leave | None) -> R:
        if params.method in UNQUEUED:
            return _decode(params, await self._exchange(params, leave))
        if self._in_flight < self.limits.calls and self._queue.items is None:
            self._in_flight += 1
        else:
            await self._enter(params)
        try:
            answer = await self._exchange(params, leave)
        finally:
            self._leave()
        return _decode(params, answer)

    async def _exchange(self, params: Method[Any], leave: Leave | None) -> Raw:
        if self._lost is not None:
            raise self._lost
        id, message = self._endpoint.request(params.method, params)
        if len(message) > self.limits.message_bytes:
            self._endpoint.forget(id)
            limit = self.limits.message_bytes
            raise LimitExceeded(
                f"a call of more than {limit} bytes", field="message", limit=limit, got=len(message)
            )
        future: asyncio.Future[Raw] = asyncio.get_running_loop().create_future()
        self._pending[id] = future
        if self.watch is not None:
            self.watch(params, future)
        long = self._lanes.put_message(message)
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled() and self._lost is None and not (leave or self.leave)():
                await self._cancel(id, long)
            raise
        finally:
            self._endpoint.forget(id)  # no answer came when the watch has ended the waiting
            del self._pending[id]

    async def _cancel(self, id: Id, long: bool) -> None:
        """Ask the other end to give the call up and wait for the call's own answer, whatever it is."""
        answer: asyncio.Future[Raw] = asyncio.get_running_loop().create_future()
        self._pending[id] = answer
        cancelling, message = self._endpoint.request(CancelCall.method, CancelCall(id=id))
        self._lanes.put_message(message, after_long=long)
        try:
            with shielded():
                await asyncio.wait({answer}, timeout=CANCEL_SECONDS)
        finally:
            if answer.done():
                answer.exception()  # seen: an error is as good an end as any
            else:
                self._endpoint.forget(cancelling)

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
        self._admit()

    def _admit(self) -> None:
        while self._queue.items is not None and (
            self._in_flight < self.limits.calls or self._lost is not None
        ):
            place = self._queue.popleft()
            if not place.done():
                self._in_flight += 1
                place.set_result(None)


def _decode(params: Method[R], answer: Raw) -> R:
    decoder: msgspec.json.Decoder[R] = _decoder(type(params))
    try:
        return decoder.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InternalError(f"the answer to {params.method} makes no sense: {exc}") from None


@cache
def _decoder(method: type[Method[Any]]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(result_type(method))
