"""The container engine: every call bounded in number and time, every failure in our words, every death noticed.

It knows no policy: what a container is like its callers say, in the words of the engine's API.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, suppress
from functools import partial
from typing import Any, Self

from aiodocker.containers import DockerContainer
from aiodocker.volumes import DockerVolume

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, NotFound, WorkspaceUnavailable
from agent_sdk.protocol.results import Usage
from workspaces.backend import labels
from workspaces.backend.contract import Image
from workspaces.backend.docker.engine_connection import ANSWER_SECONDS, Call, EngineConnection, plain_name
from workspaces.backend.docker.engine_info import EngineInfo, usage_of
from workspaces.backend.docker.engine_streams import EngineEvents, Happened, Output, Watch
from workspaces.backend.docker.images import Images

__all__ = ["Engine", "EngineInfo", "Image", "Watch", "engine_version"]

CREATE_SECONDS = 30.0
START_SECONDS = 20.0
REMOVE_SECONDS = 30.0
FEWEST_AT_ONCE = 2

_LISTED = ("Id", "Names", "Labels", "State")


class Engine(Images, Output):
    """An engine that answers. Leaving it waits for what was being undone, and ends all watches and logs."""

    def __init__(self, url: str | None = None, *, at_once: int | None = None, patience: float = 1.0) -> None:
        """Say which one.

        Args:
            url: unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets.
            at_once: how many heavy calls (create, start, remove) may run at a time; None: one per core.
            patience: all limits of time are multiplied by it, for an engine that is known to be slow.
        """
        self._connection = EngineConnection(url, patience=patience)
        self._gate = asyncio.Semaphore(at_once or max(FEWEST_AT_ONCE, os.cpu_count() or 1))
        self._events = EngineEvents(self._connection, self.inspect)
        self._undoing: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Engine at {getattr(self._connection, 'where', 'an address not yet looked for')}>"

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._connection)
            self._docker = self._connection.docker
            async with self._connection.bounded("tell what it can"):
                about = await self._docker.system.info()
            self.info = EngineInfo.from_answers(self._connection.version, about)
            self._events.since = self.info.clock
            stack.push_async_callback(self._events.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._undoing:
            await asyncio.wait(self._undoing)
        await self._stack.aclose()

    @property
    def where(self) -> str:
        """The address of the engine."""
        return self._connection.where

    # --- containers ---

    async def create(self, name: str, body: Mapping[str, Any], *, platform: str | None = None) -> str:
        """Make a container and return its id. At most 30 s; a failure or a cancel leaves none.

        Args:
            name: must be free.
            body: as POST /containers/create takes it.
            platform: e.g. `linux/amd64`; None: the engine's own.

        Raises:
            ImageUnavailable: the image is not there, or is for another platform.
            IsolationUnavailable: it cannot give what was asked for.
            WorkspaceUnavailable: the name is taken, a path is missing, …
            EngineUnavailable: it does not answer, or failed.
        """
        mark = new_id()
        marks = {labels.CREATE: mark, labels.NAME: name}
        body = {**body, "Labels": {**labels.NOT_GIVEN, **(body.get("Labels") or {}), **marks}}
        async with self._gate:
            call = asyncio.ensure_future(self._create(name, body, platform))
            try:
                return await asyncio.shield(call)
            except asyncio.CancelledError:  # the engine does not stop, so its answer is waited for elsewhere
                self._undo(self._uncreate(mark, call))
                raise
            except AgentServerError:
                await asyncio.shield(self._undo(self._uncreate(mark)))
                raise

    async def start(self, id: str) -> None:
        """Start a container. At most 20 s; one that hangs then is removed.

        Raises:
            As `create`; NotFound: there is none.
        """
        what, container = f"start the container {id[:12]}", self._container(id)
        async with self._gate:
            try:
                async with self._connection.bounded(what, phase="start", seconds=START_SECONDS):
                    await container.start()
            except AgentServerError as exc:
                if exc.retryable and "status" not in exc.details:  # nobody knows whether it starts yet
                    await asyncio.shield(self._undo(self._remove_quietly(id)))
                raise

    async def stop(self, id: str, seconds: int = 5) -> None:
        """Ask it to end, and kill it after these seconds. One that has ended or is gone already is fine."""
        await self._end("stop", id, ANSWER_SECONDS + seconds, t=seconds)

    async def kill(self, id: str, signal: str = "KILL") -> None:
        """Send it a signal. One that has ended or is gone already is fine."""
        await self._end("kill", id, ANSWER_SECONDS, signal=signal)

    async def pause(self, id: str) -> None:
        """Let nothing in it run; one that is paused already is fine.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it does not run.
        """
        await self._freeze(f"pause the container {id[:12]}", self._container(id).pause, "already paused")

    async def unpause(self, id: str) -> None:
        """Let it go on; one that is not paused is fine.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it does not run.
        """
        await self._freeze(f"unpause the container {id[:12]}", self._container(id).unpause, "not paused")

    async def remove(self, id: str) -> None:
        """Kill and remove it with its anonymous volumes. Returns when it is gone; at most 30 s."""
        what = f"remove the container {id[:12]}"
        async with self._gate:
            with suppress(NotFound):
                container = self._container(id)
                try:
                    delete = partial(container.delete, force=True, v=True)
                    await self._connection.ask(what, delete, seconds=REMOVE_SECONDS)
                except WorkspaceUnavailable as exc:
                    if exc.details.get("status") != 409:
                        raise
                    # Somebody else is at it.
                    removed = partial(container.wait, condition="removed")
                    await self._connection.ask(what, removed, seconds=REMOVE_SECONDS)

    async def inspect(self, id: str) -> dict[str, Any]:
        """Return all the engine knows of a container, by its id or name.

        Raises:
            NotFound: there is none.
        """
        return dict(await self._connection.ask(f"describe the container {id[:64]}", self._container(id).show))

    async def containers(
        self, by_label: Mapping[str, str | None], *, name: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the containers in all states that have these labels, with any value where that is None.

        Each has its `Id`, `Names`, `Labels` and `State`. Those with the labels of an image alone are none of ours, and
        left out.
        """
        filters = _by_label(by_label)
        if name is not None:
            filters["name"] = [f"^/{name}$"]
        listing = partial(self._docker.containers.list, all=True, filters=json.dumps(filters))
        answer = [
            {name: found[name] for name in _LISTED if name in found}
            for found in await self._connection.ask("list containers", listing)
        ]
        return [found for found in answer if not by_label or labels.CREATE in by_label or _is_ours(found)]

    async def stats(self, id: str) -> Usage:
        """Return what a container uses at this moment; of one that does not run nothing is known.

        Raises:
            NotFound: there is none.
        """
        path, once = f"containers/{plain_name(id)}/stats", {"stream": "false", "one-shot": "true"}
        stats = partial(self._connection.request, "GET", path, once)
        return usage_of(await self._connection.ask(f"tell what the container {id[:12]} uses", stats))

    def watch(self, id: str) -> Watch:
        """Watch the container with this full id, that exists already, for its end and other changes."""
        return self._events.watch(id)

    def happenings(self) -> AbstractContextManager[asyncio.Queue[Happened | None]]:
        """Have told in a queue what happens to containers that are ours; None: something may have been missed."""
        return self._events.listened()

    # --- volumes ---

    async def volumes(self, by_label: Mapping[str, str | None]) -> list[dict[str, Any]]:
        """Return the volumes with these labels."""
        listing = partial(self._docker.volumes.list, filters=_by_label(by_label))
        return list((await self._connection.ask("list volumes", listing)).get("Volumes") or ())

    async def create_volume(self, name: str, body: Mapping[str, Any]) -> None:
        """Make a volume; `body` as POST /volumes/create takes it. An existing one of this name is left as it is."""
        async with self._gate, self._connection.bounded(f"create the volume {name}", phase="create"):
            await self._docker.volumes.create({"Name": name, **body})

    async def remove_volume(self, name: str) -> None:
        """Remove a volume. One that is gone is fine.

        Raises:
            WorkspaceUnavailable: a container uses it.
        """
        with suppress(NotFound):
            delete = DockerVolume(self._docker, plain_name(name)).delete
            await self._connection.ask(f"remove the volume {name}", delete)

    # --- how ---

    def _container(self, id: str) -> DockerContainer:
        return self._docker.containers.container(plain_name(id))

    async def _create(self, name: str, body: Mapping[str, Any], platform: str | None) -> str:
        params = {"name": name, **({"platform": platform} if platform else {})}
        what = f"create the container {name}"
        async with self._connection.bounded(what, phase="create", seconds=CREATE_SECONDS):
            made = await self._connection.request("POST", "containers/create", params, body)
            return str(made["Id"])

    async def _end(self, verb: str, id: str, seconds: float, **how: Any) -> None:
        try:
            end = partial(getattr(self._container(id), verb), **how)
            await self._connection.ask(f"{verb} the container {id[:12]}", end, seconds=seconds)
        except NotFound:
            pass
        except WorkspaceUnavailable as exc:
            if exc.details.get("status") != 409:  # "is not running"
                raise

    async def _freeze(self, what: str, call: Call, done: str) -> None:
        try:
            await self._connection.ask(what, call)
        except WorkspaceUnavailable as exc:
            if done not in exc.message:
                raise

    def _undo(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)
        return task

    async def _uncreate(self, mark: str, call: asyncio.Future[Any] | None = None) -> None:
        """Remove what a call made, or is about to make; what cannot be removed now the next sweep finds."""
        if call is not None:
            await asyncio.wait([call])
            call.cancelled() or call.exception()
        with suppress(AgentServerError):
            for made in await self.containers({labels.CREATE: mark}):
                await self._remove_quietly(made["Id"])

    async def _remove_quietly(self, id: str) -> None:
        with suppress(AgentServerError):
            async with self._connection.bounded("remove it"):
                await self._container(id).delete(force=True, v=True)


async def engine_version(url: str | None = None) -> str:
    """Ask an engine for its version.

    Raises:
        EngineUnavailable: there is none, it may not be used, is too old, or does not answer within 10 s.
    """
    async with EngineConnection(url) as connection:
        return str(connection.version.get("Version"))


def _is_ours(container: Mapping[str, Any]) -> bool:
    """Whether its labels were made for it: they have its name."""
    return f"/{(container.get('Labels') or {}).get(labels.NAME)}" in (container.get("Names") or ())


def _by_label(by_label: Mapping[str, str | None]) -> dict[str, list[str]]:
    return {"label": [name if value is None else f"{name}={value}" for name, value in by_label.items()]}
