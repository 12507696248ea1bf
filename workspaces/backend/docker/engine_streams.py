"""What an engine tells bit by bit: what happens to containers, and what they write.

There is one stream of events per engine, that is taken up again when it was lost. Events of the time between are not
counted on: whenever the stream begins, every watched container is looked at. So no death is missed, whoever was away:
the engine, the connection, or the one who watches.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import tenacity
from msgspec import Struct

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.checks import whole
from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable, NotFound, WorkspaceUnavailable
from workspaces.backend import labels
from workspaces.backend.contract import Cause, Ending
from workspaces.backend.docker.engine_connection import ANSWER_SECONDS, EngineConnection

STEADY_SECONDS = 5.0
"""A stream that lived for so long is asked for again at once."""
_ENDS = ("die", "destroy")
_EVENTS = ["create", "start", "oom", "pause", "unpause", *_ENDS]
_FILTERS = {"type": ["container"], "event": _EVENTS, "label": [labels.INSTANCE]}
MOST_WAITING = 1024
"""Events that wait for somebody who is told of them; beyond that they are forgotten, and that is told."""
_KILLED = 128 + 9
_CAUSES: Mapping[int, Cause] = {_KILLED: "killed", 128 + 15: "killed"}
LONGEST_EVENT = 1 << 20
"""Bytes. An event has all labels of its container, and an image may bring any number of them."""
LONGEST_LINE = 64 << 10
"""Bytes of output; a longer line comes in pieces."""
MOST = 64 << 10
"""Bytes of last lines."""
_HEADER = struct.Struct(">BxxxL")

Inspect = Callable[[str], Awaitable[dict[str, Any]]]


class Happened(Struct, frozen=True):
    """What has happened to a container: `create`, `start`, `pause`, `unpause`, `oom`, `die` or `destroy`."""

    what: str
    id: str
    about: Mapping[str, str]
    """Its name, and its labels among what belongs to the event."""


class Watch:
    """One container, watched until `close`."""

    def __init__(self, close: Callable[[Watch], None]) -> None:
        self._close = close
        self.died: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        """Done when it has ended, or is gone; never after `close`."""
        self.oom = False
        """Whether a process in it was killed for want of memory."""

    def close(self) -> None:
        """Watch it no longer."""
        self._close(self)

    def _ended(self, ending: Ending) -> None:
        if not self.died.done():
            self.died.set_result(ending)


class EngineEvents:
    """The stream of events, from the first watch to `close`."""

    def __init__(self, connection: EngineConnection, inspect: Inspect) -> None:
        self._connection = connection
        self._inspect = inspect
        self._watches: dict[str, set[Watch]] = {}
        self.since = 0
        """What was before is known: nanoseconds by the engine's clock."""
        self._queues: set[asyncio.Queue[Happened | None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End the stream; no watch learns anything any more."""
        await cancel_and_wait(*self._tasks)

    def watch(self, id: str) -> Watch:
        """Begin to watch the container with this full id; one that has ended already is noticed, too."""
        watch = Watch(lambda watch: self._forget(id, watch))
        self._watches.setdefault(id, set()).add(watch)
        if self._following is None:
            self._following = self._spawn(self._follow())  # which looks, too
        else:
            self._spawn(self._look(id))
        return watch

    @contextmanager
    def listened(self) -> Iterator[asyncio.Queue[Happened | None]]:
        """Have told in a queue what happens to any of them; None: something may have been missed, so look at all."""
        queue: asyncio.Queue[Happened | None] = asyncio.Queue()
        self._queues.add(queue)
        queue.put_nowait(None)
        if self._following is None:
            self._following = self._spawn(self._follow())
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    def _forget(self, id: str, watch: Watch) -> None:
        watches = self._watches.get(id, set())
        watches.discard(watch)
        if not watches:
            self._watches.pop(id, None)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
        async with self._connection.stream("GET", "events", params, what="tell its events") as response:
            began = clock()
            self._look_at_all()
            with suppress(aiohttp.ClientError, OSError):  # that is how engines end
                async for line in _events(response.content):
                    self._happened(line)
        if clock() - began < STEADY_SECONDS:
            raise EngineUnavailable("the engine ended its stream of events", phase="engine")

    def _happened(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except (ValueError, RecursionError):
            self._look_at_all()  # it may have been anything
            return
        self.since = max(self.since, event.timeNano + 1)
        id = event.Actor.ID
        self._tell(Happened(event.Action, id, event.Actor.Attributes))
        if event.Action == "oom":
            for watch in self._watches.get(id, ()):
                watch.oom = True
        elif event.Action in _ENDS and id in self._watches:
            code = whole(event.Actor.Attributes.get("exitCode", ""))
            self._spawn(self._look(id, code, ended=event.timeNano))

    def _tell(self, happened: Happened | None) -> None:
        for queue in self._queues:
            if queue.qsize() >= MOST_WAITING:
                while not queue.empty():
                    queue.get_nowait()
                happened = None
            queue.put_nowait(happened)

    def _look_at_all(self) -> None:
        self._tell(None)
        for id in self._watches:
            self._spawn(self._look(id))

    async def _look(self, id: str, exit_code: int | None = None, *, ended: int | None = None) -> None:
        """Look whether it lives.

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
            watch._ended(_ending(exit_code, oom, str(state.get("Error") or "")))


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


def _ending(exit_code: int | None, oom: bool, error: str) -> Ending:
    if oom:
        return Ending("oom", exit_code, "it used more memory than it may and was killed")
    if exit_code is None:
        return Ending("engine", None, "it was removed")
    reason = f"it ended with exit code {exit_code}" + (f": {error}" if error else "")
    return Ending(_CAUSES.get(exit_code, "exit"), exit_code, reason)


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream, whole ones only; one that is too long comes cut to nothing."""
    rest, too_long = b"", False
    async for piece in stream.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield b"" if too_long or len(line) > LONGEST_EVENT else line
            too_long = False
        if len(rest) > LONGEST_EVENT:
            rest, too_long = b"", True


class Output:
    """What the containers of an engine write."""

    _connection: EngineConnection

    async def logs(self, id: str, lines: int = 20) -> str:
        """Return the last lines that a container wrote, at most 64 KiB; empty when there is none, or nothing."""
        found = ""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async for line in self._output(id, follow="0", tail=str(lines)):
                    found = f"{found}{line}\n"[-MOST:]
        except (AgentServerError, TimeoutError):
            pass
        return found.rstrip("\n")

    def follow_logs(self, id: str, *, since_now: bool = False) -> AsyncIterator[str]:
        """Return the lines that a container writes, from its start until it ends; close the iterator to end it before.

        When it has ended, an engine may leave out a last line that has no newline.

        Args:
            id: of the container.
            since_now: leave out what it has written already.

        Raises:
            NotFound: there is none. EngineUnavailable: the engine does not answer, or ended before the container.
        """
        return self._output(id, follow="1", tail="0" if since_now else "all")

    async def _output(self, id: str, *, follow: str, tail: str) -> AsyncIterator[str]:
        """Yield the lines of the output of a container; `follow` and `tail` as the engine takes them."""
        what = f"show the output of the container {id[:12]}"
        params = {"stdout": "1", "stderr": "1", "follow": follow, "tail": tail}
        async with self._connection.stream(
            "GET", f"containers/{quote(id, safe='')}/logs", params, what=what
        ) as response:
            rest = b""
            async for piece in _pieces(response.content):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield _text(line)
                if len(rest) > LONGEST_LINE:
                    yield _text(rest)
                    rest = b""
            if rest:
                yield _text(rest)


async def _pieces(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """What was written, without the headers that say whether it was standard output or error."""
    try:
        while True:
            _, length = _HEADER.unpack(await stream.readexactly(_HEADER.size))
            while length:
                piece = await stream.read(min(length, LONGEST_LINE))
                if not piece:
                    return
                length -= len(piece)
                yield piece
    except asyncio.IncompleteReadError:
        return


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace")
