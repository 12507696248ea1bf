"""Calling what users gave us: plain or async, and whatever it raises is theirs, not ours."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable

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
