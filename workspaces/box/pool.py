"""Boxes that run already and wait for an owner: so many of each image, filled up again in the background.

Such a box has no identity yet. Whoever needs one of its kind takes it, gives it theirs, and waits for nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Self

from msgspec.structs import replace

from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.remote.connection import connect
from workspaces.box.container import BoxContainer

AGAIN_SECONDS = 15.0
"""Between two looks at what is missing, when a start has failed or a box has died."""


class Pool:
    """Entering begins to fill it, leaving ends all that nobody has taken."""

    def __init__(
        self,
        wanted: Mapping[str, int],
        make: Callable[[Sandbox], BoxContainer],
        *,
        on_ready: Callable[[str], None],
        on_problem: Callable[[Exception], None],
    ) -> None:
        """Say what is to wait.

        Args:
            wanted: how many boxes of which image.
            make: makes a box that has not started and has no owner.
            on_ready: told of the image of each that waits.
            on_problem: told why one could not be started; that is tried again.
        """
        self._wanted = wanted
        self._make = make
        self._on_ready = on_ready
        self._on_problem = on_problem
        self._waiting: dict[BoxContainer, AsyncExitStack] = {}
        """In the order of their starts; each with a connection, so that it does not think it was forgotten."""
        self._taken = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Pool: {len(self._waiting)} of {sum(self._wanted.values())} wait>"

    async def __aenter__(self) -> Self:
        if self._wanted:
            self._filling = asyncio.create_task(self._fill())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait([self._filling])
        for box in list(self._waiting):
            self._later(self._end(box))
        if self._ending:
            await asyncio.wait(self._ending)

    def take(self, spec: Sandbox) -> BoxContainer | None:
        """Return a box that is what was asked for, but for what an owner brings; it belongs to the caller now."""
        for box, company in self._waiting.items():
            if not box.ended.done() and spec.pull != "always" and _kind(spec) == box.spec:
                del self._waiting[box]
                self._later(company.aclose())
                self._taken.set()
                return box
        return None

    def waiting(self, image: str) -> int:
        """How many boxes of an image wait."""
        return sum(box.spec.image == image and not box.ended.done() for box in self._waiting)

    async def _fill(self) -> None:
        while True:
            self._taken.clear()
            try:
                for image, count in self._wanted.items():
                    while self.waiting(image) < count:
                        await self._add(Sandbox(image=image))
            except (AgentServerError, OSError) as exc:
                self._on_problem(exc)
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_SECONDS):
                    await self._taken.wait()

    async def _add(self, spec: Sandbox) -> None:
        box = self._make(spec)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(box.end)
            await box.launch()
            company = await stack.enter_async_context(AsyncExitStack())
            await company.enter_async_context(connect(box.url))
            stack.pop_all()
        self._waiting[box] = company
        box.ended.add_done_callback(lambda _: self._died(box))
        self._on_ready(spec.image)

    def _died(self, box: BoxContainer) -> None:
        if box in self._waiting:
            self._later(self._end(box))

    async def _end(self, box: BoxContainer) -> None:
        company = self._waiting.pop(box, None)
        if company is not None:
            await company.aclose()
        await box.end()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _kind(spec: Sandbox) -> Sandbox:
    """What cannot be changed any more once a box runs."""
    return replace(spec, env={}, idle_ttl=None, pull="missing")
