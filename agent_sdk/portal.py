"""The way of blocking code into one event loop in one daemon thread, and of callbacks back into the caller's thread."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, BlockingPortalProvider

T = TypeVar("T")
logger = logging.getLogger("agent_sdk")

_portals = BlockingPortalProvider()
_WAKE = object()
_END = object()


class Caller:
    """One object's way into the loop, and the callbacks that come back from it."""

    def __init__(self) -> None:
        self._portal: BlockingPortal | None = None
        self._inbox: SimpleQueue[Any] = SimpleQueue()

    def open(self) -> BlockingPortal:
        """Start the loop, where nobody did."""
        if self._portal is None:
            self._portal = _portals.__enter__()
        return self._portal

    def close(self) -> None:
        """Let go of the loop; it ends with the last who does."""
        if self._portal is not None:
            self._portal = None
            _portals.__exit__(None, None, None)

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """From the loop: have the waiting caller run this."""
        self._inbox.put((function, arguments))

    def call(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in the loop and wait, running callbacks meanwhile.

        Ctrl-C cancels it and waits until it has cleaned up; a second one does not wait.
        """
        over = Event()

        async def work() -> T:
            try:
                return await start()
            finally:
                over.set()

        future = self.open().start_task_soon(work)
        future.add_done_callback(lambda _: self._inbox.put(_WAKE))
        try:
            while not future.done():
                self._run(self._inbox.get())
            self._run_waiting()
        except BaseException:
            future.cancel()
            over.wait()
            raise
        result: T = future.result()
        return result

    def iterate(self, start: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        """Run an async iterator in the loop, one item at a time."""
        iterator = start()

        async def following() -> Any:
            return await anext(iterator, _END)

        async def finish() -> None:
            await iterator.aclose()  # type: ignore[attr-defined]

        try:
            while (item := self.call(following)) is not _END:
                yield item
        finally:
            self.call(finish)

    def _run_waiting(self) -> None:
        try:
            while True:
                self._run(self._inbox.get_nowait())
        except Empty:
            return

    def _run(self, item: Any) -> None:
        if item is _WAKE:
            return
        function, arguments = item
        try:
            function(*arguments)
        except Exception:  # a callback is the user's; its error must not stop the others
            logger.exception("a callback failed")
