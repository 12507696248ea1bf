"""Finishing what must not be left half done, under any kind of cancellation.

asyncio cancels a task once; a cancel scope of anyio does it again at every await until the scope is
left. Callers may use either. anyio is not loaded for that: where its backend is not, no scope exists.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def shielded() -> AbstractContextManager[object]:
    """Keep the cancel scopes of anyio that surround the task from cancelling what is awaited in the block."""
    if "anyio._backends._asyncio" not in sys.modules:
        return nullcontext()
    import anyio  # noqa: PLC0415  loaded already

    return anyio.CancelScope(shield=True)


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
