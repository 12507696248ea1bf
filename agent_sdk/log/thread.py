"""The thread that owns a database: jobs in, results out. Knows nothing of events.

Writes share commits: what queued up while the last commit waited for the disk goes into the next one,
and one call into the event loop tells all who wait. Nobody hears of a write before its commit.
Jobs of one lane run in the order of their submission; the lanes take turns, so that one which is
flooded delays the others by one commit.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, Self, TypeVar

from msgspec import Struct

from agent_sdk.log.database import Database
from agent_sdk.protocol.errors import StateConflict, StorageFull, WorkspaceUnavailable

logger = logging.getLogger("agent_sdk")

T = TypeVar("T")

JOBS_PER_COMMIT = 512
LOOK_SECONDS = 5.0
"""Without a write, the files are looked at this often: somebody may have removed them."""


class _Job(Struct, Generic[T], eq=False):
    work: Callable[[Database], T]
    future: asyncio.Future[T]
    lane: str
    writes: bool
    frees: bool
    result: T | None = None
    error: BaseException | None = None


class DatabaseThread:
    """One daemon thread with one database. Use it from one event loop."""

    def __init__(self, open_database: Callable[[], Database], *, name: str) -> None:
        self._open_database = open_database
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lanes: OrderedDict[str, deque[_Job[Any]]] = OrderedDict()
        """What came out of the queue and waits for its turn; used by the thread alone."""
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[BaseException] = self._loop.create_future()
        """Done when the device below the database has failed: no write is accepted any more."""
        self.full = False
        """Whether the last write found no room."""
        self.pending = 0
        """How many jobs are queued or being done."""
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._accepts = True
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Self:
        """Wait until the database is open; raise what opening it raised."""
        await asyncio.shield(self._ready)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Do what is queued, close the database, end the thread."""
        if self._accepts:
            self._accepts = False
            self._jobs.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    def submit(
        self, work: Callable[[Database], T], *, lane: str = "", writes: bool, frees: bool = False
    ) -> asyncio.Future[T]:
        """Queue a job; those of a lane run in the order of their submission, a write is answered after its commit.

        `work` runs in the thread. It may run twice: alone, after the commit it shared with others failed.

        Args:
            frees: it makes room, and may use the reserve for that.

        Raises:
            StateConflict: it was left.
        """
        if not self._accepts:
            raise StateConflict("the log is closed", state="closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self.pending += 1
        self._jobs.put(_Job(work, future, lane, writes, frees))
        return future

    def _run(self) -> None:
        try:
            database = self._open_database()
        except BaseException as exc:  # noqa: BLE001  a thread's end: whoever waits gets the exception
            self._tell(self._ready.set_exception, exc)
            self._tell(self._ended.set_result, None)
            return
        self._tell(self._ready.set_result, None)
        try:
            while batch := self._next(database):
                self._do(database, batch)
                self._tell(self._answer_all, batch)
                if database.broken is not None:
                    self._tell(self._fail, database.broken)
            database.close()
        except BaseException as exc:  # a thread's end; what was committed stays in the WAL
            logger.error("the log's database could not be closed properly", exc_info=exc)
        finally:
            self._tell(self._ended.set_result, None)

    def _next(self, database: Database) -> list[_Job[Any]]:
        """Return what is done next, one job of each lane in turn; nothing when this is the end."""
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait() if self._lanes or self._ending else self._wait(database)
                if job is None:
                    self._ending = True
                else:
                    self._lanes.setdefault(job.lane, deque()).append(job)
        batch: list[_Job[Any]] = []
        while self._lanes and len(batch) < JOBS_PER_COMMIT:
            lane, jobs = self._lanes.popitem(last=False)
            batch.append(jobs.popleft())
            if jobs:
                self._lanes[lane] = jobs
        return batch

    def _wait(self, database: Database) -> _Job[Any] | None:
        while True:
            try:
                return self._jobs.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                database.look()
                if database.broken is not None:
                    self._tell(self._fail, database.broken)

    def _do(self, database: Database, batch: list[_Job[Any]]) -> None:
        writes = [job for job in batch if job.writes]
        if len(writes) < 2 or not self._together(database, writes):
            for job in writes:
                self._together(database, [job])
                if job.frees and isinstance(job.error, StorageFull) and database.space.spend():
                    job.error = None
                    self._together(database, [job])
        if self.full and any(job.frees and job.error is None for job in writes):
            database.space.give_back()
        for job in batch:
            if not job.writes:
                try:
                    job.result = job.work(database)
                except BaseException as exc:  # noqa: BLE001  the job's owner gets it
                    job.error = exc

    def _together(self, database: Database, jobs: list[_Job[Any]]) -> bool:
        """Do the jobs in one commit; a single one keeps its error, several are left to be done alone."""
        ordinary = [job for job in jobs if not job.frees]
        try:
            if database.broken is not None:
                # After a failed fsync the kernel may have dropped the pages: a retry that succeeds proves nothing.
                raise WorkspaceUnavailable(
                    "the disk below the log has failed; restart the program", phase="storage"
                )
            if ordinary:
                database.space.admit()
            with database.transaction():
                for job in jobs:
                    job.result = job.work(database)
            if database.broken is not None:  # while the WAL was moved into the file
                raise database.broken
        except BaseException as exc:  # noqa: BLE001  the job's owner gets it
            if len(jobs) > 1:
                return False
            jobs[0].error = exc
            self.full = self.full or isinstance(exc, StorageFull)
        else:
            self.full = self.full and not ordinary
        return True

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    def _tell(self, function: Callable[..., object], *values: object) -> None:
        # The loop may be gone when the program ends without closing the log: nobody is left to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *values)

    def _answer_all(self, batch: list[_Job[Any]]) -> None:
        self.pending -= len(batch)
        for job in batch:
            if job.future.done():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)
