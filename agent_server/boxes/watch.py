"""What is asked of a box is waited for as long as it answers at all: one that was stopped or hangs is told in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from agent_sdk.protocol.errors import AgentServerError, WorkspaceUnavailable
from agent_sdk.protocol.events import Waiting
from agent_sdk.protocol.methods import Method, Ping
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import DISCONNECTED

SILENT_SECONDS = 15.0
"""A call without a limit of its own asks so often whether the box answers, and gives it so long."""
SILENT = "silent"
START_SECONDS = 1.0
"""A start that takes longer is told in an event: usual ones take less, the pull of an image minutes."""
STARTS = "its box, which is being started; an image that is missing is pulled first"

T = TypeVar("T")


class BoxWatch:
    """Whether a box answers at all, as a peer.Watch."""

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

    async def __call__(self, params: Method[Any], calling: Coroutine[Any, Any, T]) -> T:
        """Await what the box answers to a call.

        Raises:
            WorkspaceUnavailable: it does not answer at all; details: phase `silent`. What was asked for may still be
                done.
        """
        if isinstance(params, Ping):
            return await calling
        limit = getattr(params, "timeout_ms", None)
        patience = SILENT_SECONDS if limit is None else self._patience
        seconds = patience if limit is None else limit / 1000 + patience
        task = asyncio.ensure_future(calling)
        try:
            while not (await asyncio.wait([task], timeout=seconds))[0]:
                if not await self.answers(patience):
                    task.cancel(DISCONNECTED)
                    raise WorkspaceUnavailable(
                        "the box does not answer: it was stopped, or hangs; let it go on and repeat the call with its "
                        "op_id, or delete the conversation",
                        phase=SILENT,
                    )
                seconds = SILENT_SECONDS
            return task.result()
        except asyncio.CancelledError as exc:
            task.cancel(*exc.args)
            raise
        finally:
            await asyncio.wait([task])

    async def answers(self, seconds: float) -> bool:
        """Whether the box answers within these seconds, or need not."""
        asking = asyncio.ensure_future(self._peer.call(Ping()))
        try:
            await asyncio.wait([asking], timeout=seconds)
            return asking.done() or self._still()
        finally:
            asking.cancel(DISCONNECTED)
            await asyncio.gather(asking, return_exceptions=True)


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
