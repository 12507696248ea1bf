"""What is to be seen of a box: whether it answers at all, so that nobody waits for one that hangs, and what happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import msgspec
from msgspec import Raw

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import AgentServerError, WorkspaceUnavailable
from agent_sdk.protocol.events import Waiting, WorkspaceChanged
from agent_sdk.protocol.methods.connection import Ping
from agent_sdk.protocol.methods.method import Method
from agent_sdk.protocol.methods.workspace import LimitReached
from agent_sdk.rpc.peer import Peer

SILENT_SECONDS = 15.0
"""A call without a limit of its own asks so often whether the box answers, and gives it so long."""
SILENT = "silent"
START_SECONDS = 1.0
"""A start that takes longer is told in an event: usual ones take less, the pull of an image minutes."""
LIMITED_SECONDS = 10.0
"""At least between two events that tell of the same limit: a box could say so without end."""
SHOWN_DETAIL = 500
STARTS = "its box, which is being started; an image that is missing is pulled first"

Listener = Callable[[WorkspaceChanged | Waiting], None]


class BoxEvents:
    """What happens to the boxes of a workspace, for those who listen. Of plain processes, their loss alone."""

    def __init__(self, *, sandbox: bool) -> None:
        self.untold: WorkspaceChanged | None = None
        """How the last box ended, when nobody listened; for whoever tells it, once."""
        self._sandbox = sandbox
        self._listeners: dict[object, Listener] = {}
        self._limited: dict[str, float] = {}
        """When each limit may be told of again."""

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each event from now on; returns how to stop that."""
        key = object()
        self._listeners[key] = listener
        return lambda: self._listeners.pop(key, None) and None

    def publish(self, event: WorkspaceChanged) -> None:
        """Tell the listeners; how a box has ended is kept for the first who comes when there are none."""
        if event.state != "lost" and not self._sandbox:
            return
        if not self._listeners and event.state in ("lost", "stopped"):
            self.untold = event
        self.tell(event)

    def tell(self, event: WorkspaceChanged | Waiting) -> None:
        """Tell the listeners there are."""
        for listener in list(self._listeners.values()):
            listener(event)

    def heed(self, method: str, params: Raw) -> None:
        """Take a notice of a box."""
        if method != LimitReached.method:
            return
        with suppress(msgspec.DecodeError):
            limit = msgspec.json.decode(params, type=LimitReached)
            now = asyncio.get_running_loop().time()
            if now >= self._limited.get(limit.limit, 0.0):
                self._limited[limit.limit] = now + LIMITED_SECONDS
                reason = limit.detail[:SHOWN_DETAIL]
                self.publish(WorkspaceChanged(state="limited", cause=limit.limit, reason=reason))


class BoxWatch:
    """Whether a box answers at all, as a rpc.calls.Watch. Leaving it ends the questions that are under way."""

    def __init__(self, peer: Peer, patience: float, still: Callable[[], bool]) -> None:
        """Take what it needs.

        Args:
            peer: the connection to the box.
            patience: seconds for its answer once the limit of a call is over.
            still: whether it is frozen on purpose, and need not answer.
        """
        self._peer = peer
        self._patience = patience
        self._still = still
        self._asking: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await cancel_and_wait(*self._asking)

    def __call__(self, params: Method[Any], waiting: asyncio.Future[Any]) -> None:
        """End the waiting of a call with WorkspaceUnavailable, details: phase `silent`, when the box does not answer at
        all: the limit of the call is over, or SILENT_SECONDS where it has none. What was asked for may still be done.
        """
        if isinstance(params, Ping):
            return
        limit = getattr(params, "timeout_ms", None)
        patience = SILENT_SECONDS if limit is None else self._patience
        self._look_after(patience if limit is None else limit / 1000 + patience, waiting, patience)

    def _look_after(self, seconds: float, waiting: asyncio.Future[Any], patience: float) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, self._look, waiting, patience)
        waiting.add_done_callback(lambda _: timer.cancel())

    def _look(self, waiting: asyncio.Future[Any], patience: float) -> None:
        asking = asyncio.create_task(self._ask(waiting, patience))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)

    async def _ask(self, waiting: asyncio.Future[Any], patience: float) -> None:
        answers = await self.answers(patience)
        if waiting.done():
            return
        if answers:
            self._look_after(SILENT_SECONDS, waiting, patience)
        else:
            waiting.set_exception(
                WorkspaceUnavailable(
                    "the box does not answer: it was stopped, or hangs; let it go on and repeat the call with its "
                    "op_id, or delete the conversation",
                    phase=SILENT,
                )
            )

    async def answers(self, seconds: float) -> bool:
        """Whether the box answers within these seconds, or need not."""
        asking = asyncio.ensure_future(self._peer.call(Ping(), leave=lambda: True))
        try:
            await asyncio.wait([asking], timeout=seconds)
            return asking.done() or self._still()
        finally:
            await cancel_and_wait(asking)


@contextmanager
def told_if_long(tell: Callable[[Waiting], None], seconds: float = START_SECONDS) -> Iterator[None]:
    """Tell that a box is waited for when the block, which starts it, takes longer; and then that this is over."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    timer = loop.call_later(seconds, tell, Waiting(what="box", reason=STARTS))
    try:
        yield
    finally:
        timer.cancel()
        if loop.time() - began >= seconds:
            tell(Waiting(what="box"))


def is_silent(error: AgentServerError) -> bool:
    """Whether a call failed because its box does not answer: what becomes of it is open."""
    return error.details.get("phase") == SILENT
