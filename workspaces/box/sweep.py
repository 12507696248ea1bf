"""Removes what nobody owns any more: containers, networks and volumes that somebody who was killed has left.

Ours are those with the label of our instance; of them everything goes that nothing on record names. Records are written
before the engine hears of anything, so whatever it has without a record is left over. Things of other instances go when
they do not run and their time is over: then whoever owned them does not come back. What has no labels is never touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Self

from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.docker import labels
from workspaces.backend.docker.engine import Engine

EVERY_SECONDS = 15.0
GRACE_SECONDS = 60.0
"""After the time of something of others is over: their clock may be another one, or they are just starting it."""
AT_REST = ("created", "exited", "dead")
"""States of a container in which nothing runs."""

Kind = Literal["container", "network", "volume"]
OnRemoved = Callable[[Kind, str], None]
OnProblem = Callable[[Exception], None]


class Found(NamedTuple):
    """One thing the engine has."""

    kind: Kind
    id: str
    name: str
    labels: Mapping[str, str]
    at_rest: bool


class Sweep:
    """Sweeps when it is entered, and every 15 s until it is left."""

    def __init__(
        self,
        engine: Engine,
        instance: str,
        owned: Callable[[], Collection[str]],
        *,
        on_removed: OnRemoved,
        on_problem: OnProblem,
        every: float = EVERY_SECONDS,
    ) -> None:
        """Say whose things are swept.

        Args:
            engine: where.
            instance: the label of ours.
            owned: the names of those that somebody has on record; called in a thread.
            on_removed: told of everything that was removed.
            on_problem: told when the engine does not answer; the next sweep comes in any case.
            every: seconds between two sweeps.
        """
        self._engine = engine
        self._instance = instance
        self._owned = owned
        self._on_removed = on_removed
        self._on_problem = on_problem
        self._every = every
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Sweep of {self._instance}>"

    async def __aenter__(self) -> Self:
        await self._try()
        self._task = asyncio.create_task(self._repeat())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def once(self) -> None:
        """Sweep now.

        Raises:
            EngineUnavailable: the engine does not answer.
        """
        # Looked for first: what is not on record by then is nobody's.
        left = await self._find({labels.INSTANCE: self._instance})
        owned = await in_thread(self._owned)
        left = [thing for thing in left if thing.name not in owned]
        others = await self._find({labels.INSTANCE: None, labels.EXPIRES: None})
        left += [
            thing for thing in others if thing.labels[labels.INSTANCE] != self._instance and _is_over(thing)
        ]
        await asyncio.gather(*(self._remove(thing) for thing in left if thing.kind == "container"))
        # Containers may have used these; what is still in use the engine does not remove.
        await asyncio.gather(*(self._remove(thing) for thing in left if thing.kind != "container"))

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            await self._try()

    async def _try(self) -> None:
        try:
            await self.once()
        except (AgentServerError, OSError) as exc:
            self._on_problem(exc)

    async def _find(self, wanted: Mapping[str, str | None]) -> list[Found]:
        containers = await self._engine.containers(wanted)
        found = [_found("container", c["Id"], c["Names"][0].lstrip("/"), c) for c in containers]
        found += [_found("network", n["Id"], n["Name"], n) for n in await self._engine.networks(wanted)]
        return found + [_found("volume", v["Name"], v["Name"], v) for v in await self._engine.volumes(wanted)]

    async def _remove(self, thing: Found) -> None:
        remove = {
            "container": self._engine.remove,
            "network": self._engine.remove_network,
            "volume": self._engine.remove_volume,
        }[thing.kind]
        with suppress(AgentServerError):  # in use, or the engine is busy: the next sweep tries again
            await remove(thing.id)
            self._on_removed(thing.kind, thing.name)


def _found(kind: Kind, id: str, name: str, thing: Mapping[str, Any]) -> Found:
    return Found(kind, id, name, thing["Labels"], thing.get("State", AT_REST[0]) in AT_REST)


def _is_over(thing: Found) -> bool:
    expires = thing.labels[labels.EXPIRES]
    over = expires.isascii() and expires.isdigit() and int(expires) + GRACE_SECONDS < time.time()
    return over and thing.at_rest
