"""What happens to containers: one stream of events per engine, that is taken up again when it was lost.

Events of the time between are not counted on: whenever the stream begins, every watched container is
looked at. So no death is missed, whoever was away: the engine, the connection, or the one who watches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import aiohttp
import msgspec
import tenacity
from msgspec import Struct

from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable, NotFound, WorkspaceUnavailable
from workspaces.backend.docker import labels
from workspaces.backend.docker.engine_api import EngineApi
from workspaces.backend.docker.engine_lines import lines_of

STEADY_SECONDS = 5.0
"""A stream that lived for so long is asked for again at once."""
_CHANGES = ("oom", "pause", "unpause")
_FILTERS = {"type": ["container"], "event": ["die", "destroy", *_CHANGES], "label": [labels.INSTANCE]}
_KILLED = 137

Inspect = Callable[[str], Awaitable[dict[str, Any]]]


class Death(Struct, frozen=True):
    """How a container ended."""

    exit_code: int | None
    """None: nobody knows it any more."""
    oom: bool
    """Whether it was killed because it used more memory than it may."""
    reason: str
    """As words."""


class Watch:
    """One container, watched until `close`."""

    def __init__(self, close: Callable[[Watch], None]) -> None:
        self._close = close
        self._tell: list[Callable[[str], None]] = []
        self.died: asyncio.Future[Death] = asyncio.get_running_loop().create_future()
        """Done when it has ended, or is gone; never after `close`."""
        self.oom = False
        """Whether a process in it was killed for want of memory."""

    def on_change(self, tell: Callable[[str], None]) -> None:
        """Have somebody called with `oom`, `pause` or `unpause` when that happens to it."""
        self._tell.append(tell)

    def close(self) -> None:
        """Watch it no longer."""
        self._close(self)

    def _changed(self, change: str) -> None:
        self.oom = self.oom or change == "oom"
        for tell in self._tell:
            tell(change)

    def _ended(self, death: Death) -> None:
        if not self.died.done():
            self.died.set_result(death)


class EngineEvents:
    """See the module's docstring. Leaving ends the stream."""

    def __init__(self, api: EngineApi, inspect: Inspect) -> None:
        self._api = api
        self._inspect = inspect
        self._watches: dict[str, set[Watch]] = {}
        self.since = 0
        """What was before is known: nanoseconds by the engine's clock."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End the stream; no watch learns anything any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def watch(self, id: str) -> Watch:
        """Begin to watch the container with this full id; one that has ended already is noticed, too."""
        watch = Watch(lambda watch: self._forget(id, watch))
        self._watches.setdefault(id, set()).add(watch)
        if self._tasks:
            self._spawn(self._look(id))
        else:
            self._spawn(self._follow())  # which looks, too
        return watch

    def _forget(self, id: str, watch: Watch) -> None:
        watches = self._watches.get(id, set())
        watches.discard(watch)
        if not watches:
            self._watches.pop(id, None)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self) -> None:
        """Read the stream for ever: whenever it is lost, ask for it again, less often each time."""
        while True:
            attempts = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(AgentServerError),
                wait=tenacity.wait_random_exponential(multiplier=0.1, max=1.0),
            )
            await attempts(self._read)

    async def _read(self) -> None:
        """Read the stream until it ends. Raises when it did not begin, or not for long."""
        clock = asyncio.get_running_loop().time
        params = {"since": f"{self.since // 10**9}.{self.since % 10**9:09}", "filters": json.dumps(_FILTERS)}
        async with self._api.stream("GET", "events", what="tell its events", params=params) as stream:
            began = clock()
            self._look_at_all()
            with suppress(aiohttp.ClientError, OSError):  # that is how engines end
                async for line in lines_of(stream):
                    self._happened(line)
        if clock() - began < STEADY_SECONDS:
            raise EngineUnavailable("the engine ended its stream of events", phase="engine")

    def _happened(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except msgspec.DecodeError:
            self._look_at_all()  # it may have been anything
            return
        self.since = max(self.since, event.timeNano + 1)
        id = event.Actor.ID
        if event.Action in _CHANGES:
            for watch in list(self._watches.get(id, ())):
                watch._changed(event.Action)
        elif id in self._watches:
            code = event.Actor.Attributes.get("exitCode", "")
            number = int(code) if code.isdecimal() and len(code) <= 10 else None
            self._spawn(self._look(id, number, ended=event.timeNano))

    def _look_at_all(self) -> None:
        for id in self._watches:
            self._spawn(self._look(id))

    async def _look(self, id: str, exit_code: int | None = None, *, ended: int | None = None) -> None:
        """See whether it lives.

        Args:
            id: of the container.
            exit_code: that an event told.
            ended: when it ended, as an event says, in nanoseconds; that counts when it cannot be looked at any
                more, and not when it was started again since then. None: no event said so.
        """
        state: dict[str, Any] = {}
        try:
            state = (await self._inspect(id)).get("State") or {}
        except NotFound:
            state = {"Status": "removed"}
        except WorkspaceUnavailable:
            if ended is None:
                return  # the stream is lost as well; everything is looked at when it is there again
        lives = state.get("Running") or state.get("Status") in ("created", "restarting")
        if lives and (ended is None or _since(state) > ended):
            return
        if exit_code is None and not state.get("Running"):
            exit_code = state.get("ExitCode")
        for watch in list(self._watches.get(id, ())):
            oom = bool(state.get("OOMKilled")) or (watch.oom and exit_code == _KILLED)
            watch._ended(Death(exit_code, oom, _reason(exit_code, oom, str(state.get("Error") or ""))))


class _Actor(Struct):
    ID: str
    Attributes: dict[str, str] = {}


class _Event(Struct):
    Action: str
    Actor: _Actor
    timeNano: int = 0


def _since(state: Mapping[str, Any]) -> int:
    """Since when a container runs, in nanoseconds; 0: the engine does not say."""
    try:
        return int(datetime.fromisoformat(str(state.get("StartedAt"))).timestamp() * 1e9)
    except ValueError:
        return 0


def _reason(exit_code: int | None, oom: bool, error: str) -> str:
    if oom:
        return "it used more memory than it may and was killed"
    if exit_code is None:
        return "it was removed"
    return f"it ended with exit code {exit_code}" + (f": {error}" if error else "")
