"""One runtime of the Runtime API: what it should be, what it is, and the one task that brings these together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable, NotFound
from agent_sdk.workspace.atomic_file import atomic_file
from agent_server.logs import Logs
from agent_server.runtime_api.record import RECORD, Record
from workspaces.server import Server

RESTARTS = 3
"""In a row: a runtime that dies again within RESTART_SECONDS is started this often."""
RESTART_SECONDS = 60.0
PAUSE_SECONDS = 0.5
"""Before the second of them, and more before each later one."""
REASONS = 20

PodStatus = Literal["pending", "ready", "failed", "crashloopbackoff", "not found"]
"""`not found`: there is none now, because it is paused."""


class Shown(Struct, kw_only=True, omit_defaults=False):
    """A runtime as the Runtime API tells of it."""

    session_id: str
    """The client's name for it."""
    runtime_id: str
    """This server's name for it; a session that was stopped gets another runtime."""
    url: str
    """The address of the agent server in it."""
    session_api_key: str
    """The key of that server: `Authorization: Bearer KEY`."""
    status: Literal["running", "paused", "stopped", "error"]
    """`running` and `paused`: what was asked for; `error`: it failed."""
    pod_status: PodStatus
    """What it is at present; `not found`: it is paused."""
    container_statuses: list[dict[str, Any]]
    events: list[str]
    """Why it failed."""
    restart_count: int
    """How often it ended by itself and was started again with its files; after four times within a minute it is
    given up."""
    restart_reasons: tuple[str, ...]
    pod_logs: str
    """The end of its log, where it failed."""
    image: str
    resource_factor: int
    disk: int | None
    """Bytes that its data may take; None: there is no limit here, because the machine has none or `unit_disk` is 0."""
    created_at: float
    """Seconds since the epoch."""


class Runtime:
    """One runtime. Every verb breaks off what an earlier one has begun."""

    def __init__(
        self, record: Record, server: Server, folder: Path, logs: Logs, *, start_seconds: float
    ) -> None:
        """Describe it; `recover` or `start` makes it run.

        Args:
            record: what it should be.
            server: what runs in it.
            folder: its own; it holds the record.
            logs: what happens to it is told there.
            start_seconds: how long it may take until it is ready.
        """
        self.record = record
        self.pod_status: PodStatus = "pending" if record.wanted == "running" else "not found"
        self._server = server
        self._folder = folder
        self._logs = logs
        self._log = logs.log.bind(runtime=record.runtime_id)
        self._start_seconds = start_seconds
        self._deciding = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._problem = ""
        self._words = ""

    def __repr__(self) -> str:
        return f"<Runtime {self.record.runtime_id} {self.record.wanted}, {self.pod_status}>"

    @property
    def url(self) -> str:
        """Where its server listens on this machine; valid while it is ready."""
        return self._server.url

    @property
    def runs(self) -> bool:
        """Whether it takes processors and memory, or is about to; true until a pause or an end is over."""
        return self.pod_status in ("pending", "ready")

    @property
    def status(self) -> Literal["running", "paused", "stopped", "error"]:
        """What became of what was asked for."""
        if self.record.wanted == "gone":
            return "stopped"
        if self.pod_status in ("failed", "crashloopbackoff"):
            return "error"
        return "running" if self.record.wanted == "running" else "paused"

    def shown(self, url: str) -> Shown:
        """Return what clients are told; `url` is what they reach it by."""
        record, ready = self.record, self.pod_status == "ready"
        return Shown(
            session_id=record.session_id,
            runtime_id=record.runtime_id,
            url=url,
            session_api_key=record.api_key,
            status=self.status,
            pod_status=self.pod_status,
            container_statuses=[
                {
                    "name": "agent-server",
                    "ready": ready,
                    "restart_count": record.restarts,
                    "state": self.status,
                }
            ],
            events=[self._problem] if self._problem else [],
            restart_count=record.restarts,
            restart_reasons=record.reasons,
            pod_logs=self._words,
            image=record.image,
            resource_factor=record.resource_factor,
            disk=record.disk,
            created_at=record.created,
        )

    async def settled(self, seconds: float) -> None:
        """Wait until it is not about to become something else, at most this long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.pod_status == "pending" and self.record.wanted == "running":
                    await self._changed.wait()

    # --- verbs ---

    def recover(self) -> None:
        """Go on with what a former server was asked for."""
        match self.record.wanted:
            case "running":
                self._begin(self._run)
            case "paused":
                self._begin(self._pause)
            case "gone":
                pass  # whoever recovers it stops it again

    async def start(self, admit: Callable[[], object] | None = None) -> None:
        """Make it run, unless it does; `settled` waits for it.

        Args:
            admit: called when it does not run, in the moment from which on it counts; what it raises is raised.

        Raises:
            NotFound: it has been stopped meanwhile.
        """
        async with self._deciding:
            self._check_not_stopped()
            if self._running is None or self._running.done():
                if admit is not None and not self.runs:
                    admit()
                record, status = self.record, self.pod_status
                self._show("pending")
                try:
                    await self._want("running")
                except BaseException:
                    self.record = record
                    self._show(status)
                    raise
                self._begin(self._run)

    async def pause(self) -> None:
        """Let nothing in it run; returns when that is so. Cancelling ends the waiting only.

        Raises:
            NotFound: it has been stopped meanwhile.
            WorkspaceUnavailable: it cannot be paused, and goes on.
        """
        async with self._deciding:
            self._check_not_stopped()
            await self._want("paused")
            task = self._begin(self._pause)
        await asyncio.shield(task)

    async def stop(self) -> None:
        """End it and remove all of it; returns when that is so. May be called again. Cancelling ends the waiting only.

        Raises:
            WorkspaceUnavailable: it cannot be reached.
        """
        async with self._deciding:
            await self._want("gone")
            task = self._begin(self._end)
        await asyncio.shield(task)

    async def close(self, *, end: bool) -> None:
        """Let it go on without us, or let nothing in it run until the next server comes."""
        if self._running is not None:
            self._running.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if end and self.runs and self.record.wanted == "running":
            await self._server.pause()
        await self._server.let_go()

    def _check_not_stopped(self) -> None:
        if self.record.wanted == "gone":
            raise NotFound(f"no runtime {self.record.runtime_id!r}")

    async def _want(self, wanted: Literal["running", "paused", "gone"]) -> None:
        self.record = replace(self.record, wanted=wanted)
        await self._save()

    async def _save(self) -> None:
        async with atomic_file(self._folder / RECORD, 0o600) as writer:
            await writer.write(msgspec.json.encode(self.record))
            await writer.commit()

    # --- the one task ---

    def _begin(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Do this next. What runs is broken off; what pauses or ends is not."""
        before, self._task = self._task, None
        if self._running is not None:
            self._running.cancel()
            self._running = None

        async def after() -> None:
            if before is not None:
                await asyncio.wait([before])
            await work()

        task = self._task = asyncio.create_task(after())
        task.add_done_callback(_seen)
        if work == self._run:
            self._running = task
        self._wake()
        return task

    async def _run(self) -> None:
        deaths: deque[float] = deque(maxlen=RESTARTS)
        self._problem = self._words = ""
        while True:
            self._show("pending")
            try:
                await self._ready()
                self._show("ready")
                reason = (await self._server.ended()).reason
            except AgentServerError as exc:
                if not deaths:
                    await self._failed("failed", str(exc))
                    return
                reason = str(exc)
            except Exception as exc:  # noqa: BLE001  the boundary of a task that nobody waits for
                self._logs.bug(exc, incident := new_id())
                await self._failed("failed", f"internal error, logged as {incident}")
                return
            self._log.warning("runtime_died", reason=reason)
            now = asyncio.get_running_loop().time()
            if len(deaths) == RESTARTS and now - deaths[0] < RESTART_SECONDS:
                await self._failed("crashloopbackoff", f"it died again and again: {reason}")
                return
            deaths.append(now)
            self._show("pending")
            reasons = (*self.record.reasons, reason)[-REASONS:]
            self.record = replace(self.record, restarts=self.record.restarts + 1, reasons=reasons)
            with suppress(AgentServerError):  # a full disk keeps no runtime from starting again
                await self._save()
            await asyncio.sleep((len(deaths) - 1) * PAUSE_SECONDS)

    async def _ready(self) -> None:
        began = asyncio.get_running_loop().time()
        retrying = AsyncRetrying(  # an engine that restarts comes back
            wait=wait_random_exponential(multiplier=0.2, max=5),
            stop=stop_before_delay(self._start_seconds),
            retry=retry_if_exception_type(EngineUnavailable),
            reraise=True,
        )
        await retrying(self._server.start, self._start_seconds)
        took = asyncio.get_running_loop().time() - began
        self._log.info("runtime_ready", seconds=round(took, 3))

    async def _failed(self, status: PodStatus, problem: str) -> None:
        self._problem = self._words = problem
        with suppress(AgentServerError, OSError):
            self._words = await self._server.last_words() or problem
        self._log.warning("runtime_failed", problem=problem)
        self._show(status)

    async def _pause(self) -> None:
        try:
            await self._server.pause()
        except AgentServerError:
            if self.record.wanted != "gone":
                await self._want("running")
                self._begin(self._run)
            raise
        if self.record.wanted == "paused":  # otherwise it is about to run again, and counts already
            self._show("not found")

    async def _end(self) -> None:
        await self._server.stop()
        self._show("not found")

    def _show(self, status: PodStatus) -> None:
        self.pod_status = status
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _seen(task: asyncio.Task[None]) -> None:
    """Nobody may wait for it any more."""
    if not task.cancelled():
        task.exception()
