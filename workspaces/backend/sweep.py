"""Removes what nobody owns any more: machines, and what they have stored, that somebody who was killed has left.

Ours are those with our labels; of them everything goes that nothing on record names. Records are written before the
backend hears of anything, so whatever it has without a record is left over. Those of other owners go when they do not
run and their time is over: then whoever owned them does not come back. What has no labels is never touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Self

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.checks import whole
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.contract import Backend, Found
from workspaces.backend.labels import EXPIRES, INSTANCE

EVERY_SECONDS = 15.0
GRACE_SECONDS = 60.0
"""After the time of something of others is over: their clock may be another one, or they are just starting it."""

OnRemoved = Callable[[str], None]
OnProblem = Callable[[Exception], None]


class Sweep:
    """Sweeps when it is entered, and every 15 s until it is left."""

    def __init__(
        self,
        backend: Backend,
        labels: Mapping[str, str],
        owned: Callable[[], Collection[str]],
        *,
        on_removed: OnRemoved,
        on_problem: OnProblem,
        every: float = EVERY_SECONDS,
    ) -> None:
        """Say whose machines are swept.

        Args:
            backend: where.
            labels: of ours.
            owned: the names of those that somebody has on record; called in a thread.
            on_removed: told the name of everything that was removed.
            on_problem: told when the backend does not answer; the next sweep comes in any case.
            every: seconds between two sweeps.
        """
        self._backend = backend
        self._labels = dict(labels)
        self._owned = owned
        self._on_removed = on_removed
        self._on_problem = on_problem
        self._every = every
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Sweep of {self._labels}>"

    async def __aenter__(self) -> Self:
        await self._try()
        self._task = asyncio.create_task(self._repeat())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await cancel_and_wait(self._task)

    async def once(self) -> None:
        """Sweep now.

        Raises:
            EngineUnavailable: the backend does not answer.
        """
        # Looked for first: what is not on record by then is nobody's.
        ours = await self._backend.list(self._labels)
        owned = await in_thread(self._owned)
        left = [found for found in ours if found.name not in owned]
        of_all = await self._backend.list({INSTANCE: None, EXPIRES: None})
        others = [found for found in of_all if found.labels[INSTANCE] != self._labels.get(INSTANCE)]
        left += [found for found in others if _is_over(found)]
        await asyncio.gather(*map(self._remove, left))

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            await self._try()

    async def _try(self) -> None:
        try:
            await self.once()
        except (AgentServerError, OSError) as exc:
            self._on_problem(exc)

    async def _remove(self, found: Found) -> None:
        with suppress(
            AgentServerError, OSError
        ):  # in use, or the backend is busy: the next sweep tries again
            await self._backend.stop(found.id)
            self._on_removed(found.name)


def _is_over(found: Found) -> bool:
    expires = whole(found.labels[EXPIRES])
    over = expires is not None and expires + GRACE_SECONDS < time.time()
    return over and found.state not in ("running", "paused")
