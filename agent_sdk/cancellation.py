"""What is called and what is finished although somebody may be cancelled: callbacks of users, and work half done;
and how tasks are.

What a callback raises is its own affair. asyncio cancels a task once; a cancel scope of anyio does it again at every
await until the scope is left. Callers may use either. anyio is not loaded for that: where its backend is not, no scope
exists.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

logger = logging.getLogger("agent_sdk")


async def tell(callback: Callable[..., object], *arguments: object) -> None:
    """Call it and wait for it; what it raises is logged and stops nothing.

    SystemExit and KeyboardInterrupt go on: whoever raises them wants the program to end.
    """
    try:
        waiting = callback(*arguments)
        if inspect.isawaitable(waiting):
            await waiting
    except Exception:
        logger.exception("a callback failed")
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        logger.exception("a callback failed")


def is_cancelled() -> bool:
    """Whether a CancelledError that was caught is meant for this task, and not for something it waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def shielded() -> AbstractContextManager[object]:
    """Keep the cancel scopes of anyio that surround the task from cancelling what is awaited in the block."""
    if "anyio._backends._asyncio" not in sys.modules:
        return nullcontext()
    import anyio  # noqa: PLC0415  loaded already

    return anyio.CancelScope(shield=True)


async def cancel_and_wait(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel these and wait until they have ended, however that is; None is none of them.

    Who cancels the waiting cancels them once more: what they do at their end may be cut off then, and is waited for.
    """
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    with shielded():
        await asyncio.gather(*there, return_exceptions=True)


async def to_its_end(work: Coroutine[Any, Any, object]) -> None:
    """Do what a first cancel must not stop, and wait for it all the same; a second one does not wait any longer."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with shielded():
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # who cancelled wants to hear nothing else
        raise
