"""The container engine: every call bounded in number and time, every failure in our words, every death noticed.

It knows no policy: what a container is like its callers say, in the words of the engine's API.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal, Self

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, NotFound, WorkspaceUnavailable
from agent_sdk.protocol.results import Usage
from workspaces.backend.docker import labels
from workspaces.backend.docker.engine_api import ANSWER_SECONDS, EngineApi
from workspaces.backend.docker.engine_archive import give_to_group, read_file
from workspaces.backend.docker.engine_events import Death, EngineEvents, Watch
from workspaces.backend.docker.engine_info import EngineInfo, usage_of
from workspaces.backend.docker.engine_logs import follow, last_lines
from workspaces.backend.docker.images import Image, OnProgress, Pull, ensure_image

__all__ = ["Death", "Engine", "EngineInfo", "Image", "OnProgress", "Watch", "engine_version"]

CREATE_SECONDS = 30.0
START_SECONDS = 20.0
REMOVE_SECONDS = 30.0
FEWEST_AT_ONCE = 2

_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]*")

Kind = Literal["volumes", "networks"]


class Engine:
    """An engine that answers. Leaving it waits for what was being undone, and ends all watches and logs."""

    def __init__(self, url: str | None = None, *, at_once: int | None = None, patience: float = 1.0) -> None:
        """Say which one.

        Args:
            url: unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets.
            at_once: how many heavy calls (create, start, remove) may run at a time; None: one per core.
            patience: all limits of time are multiplied by it, for an engine that is known to be slow.
        """
        self._api = EngineApi(url, patience=patience)
        self._gate = asyncio.Semaphore(at_once or max(FEWEST_AT_ONCE, os.cpu_count() or 1))
        self._events = EngineEvents(self._api, self.inspect)
        self._undoing: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()
        self.info: EngineInfo
        """What it said of itself at the start."""

    def __repr__(self) -> str:
        return f"<Engine at {getattr(self._api, 'where', 'an address not yet looked for')}>"

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._api)
            about = await self._api.ask("GET", "info", what="tell what it can")
            self.info = EngineInfo.from_answers(self._api.version, about)
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
        """Its address."""
        return self._api.where

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
        body = {**body, "Labels": {**(body.get("Labels") or {}), **marks}}
        params = {"name": name, **({"platform": platform} if platform else {})}
        async with self._gate:
            call = asyncio.ensure_future(
                self._api.ask(
                    "POST",
                    "containers/create",
                    what=f"create the container {name}",
                    phase="create",
                    seconds=CREATE_SECONDS,
                    params=params,
                    body=body,
                )
            )
            try:
                return str((await asyncio.shield(call))["Id"])
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
        what, path = f"start the container {id[:12]}", _path(id, "start")
        async with self._gate:
            try:
                await self._api.ask("POST", path, what=what, phase="start", seconds=START_SECONDS)
            except AgentServerError as exc:
                if exc.retryable and "status" not in exc.details:  # nobody knows whether it starts yet
                    await asyncio.shield(self._undo(self._remove_quietly(id)))
                raise

    async def stop(self, id: str, seconds: int = 5) -> None:
        """Ask it to end, and kill it after these seconds. One that has ended or is gone already is fine."""
        await self._signal(id, "stop", ANSWER_SECONDS + seconds, t=seconds)

    async def kill(self, id: str, signal: str = "KILL") -> None:
        """Send it a signal. One that has ended or is gone already is fine."""
        await self._signal(id, "kill", ANSWER_SECONDS, signal=signal)

    async def pause(self, id: str) -> None:
        """Let nothing in it run; one that is paused already is fine.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it does not run.
        """
        await self._freeze(id, "pause", "already paused")

    async def unpause(self, id: str) -> None:
        """Let it go on; one that is not paused is fine.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it does not run.
        """
        await self._freeze(id, "unpause", "not paused")

    async def remove(self, id: str) -> None:
        """Kill and remove it with its anonymous volumes. Returns when it is gone; at most 30 s."""
        what = f"remove the container {id[:12]}"
        async with self._gate:
            with suppress(NotFound):
                path = _path(id)
                try:
                    await self._api.ask(
                        "DELETE",
                        path,
                        what=what,
                        seconds=REMOVE_SECONDS,
                        params={"force": "1", "v": "1"},
                        again=True,
                    )
                except WorkspaceUnavailable as exc:
                    if exc.details.get("status") != 409:
                        raise
                    # Somebody else is at it.
                    await self._api.ask(
                        "POST",
                        f"{path}/wait",
                        what=what,
                        seconds=REMOVE_SECONDS,
                        params={"condition": "removed"},
                        again=True,
                    )

    async def inspect(self, id: str) -> dict[str, Any]:
        """Return all the engine knows of a container, by its id or name.

        Raises:
            NotFound: there is none.
        """
        what = f"describe the container {id[:64]}"
        return dict(await self._api.ask("GET", _path(id, "json"), what=what, again=True))

    async def containers(
        self, by_label: Mapping[str, str | None], *, name: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the containers in all states that have these labels, with any value where that is None.

        Those that have them of an image alone are none of ours, and left out.
        """
        filters = _by_label(by_label)
        if name is not None:
            filters["name"] = [f"^/{name}$"]
        params = {"all": "1", "filters": json.dumps(filters)}
        answer = await self._api.ask(
            "GET", "containers/json", what="list containers", params=params, again=True
        )
        return [found for found in answer if not by_label or labels.CREATE in by_label or _is_ours(found)]

    async def stats(self, id: str) -> Usage:
        """Return what a container uses at this moment; of one that does not run nothing is known.

        Raises:
            NotFound: there is none.
        """
        params = {"stream": "false", "one-shot": "true"}
        what = f"tell what the container {id[:12]} uses"
        return usage_of(await self._api.ask("GET", _path(id, "stats"), what=what, params=params, again=True))

    async def logs(self, id: str, lines: int = 20) -> str:
        """Return the last lines of its output, at most 64 KiB; empty when there is none, or nothing of it."""
        return await last_lines(self._api, id, lines)

    def follow_logs(self, id: str, *, since_now: bool = False) -> AsyncIterator[str]:
        """Return the lines of its output from the start until it ends; close the iterator to end it before.

        When it has ended, an engine may leave out a last line that has no newline.

        Args:
            id: of the container.
            since_now: leave out what it has written already.

        Raises:
            NotFound: there is none. EngineUnavailable: the engine does not answer, or ended before the container.
        """
        return follow(self._api, id, "0" if since_now else "all")

    async def image(
        self,
        name: str,
        *,
        pull: Pull = "missing",
        platform: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Image:
        """Return an image, pulled when it is missing or another one is wanted. Cancelling ends the pull.

        Args:
            name: as `docker pull` takes it.
            pull: `always` asks the registry although it is there, `never` asks it in no case.
            platform: e.g. `linux/arm64`; None: it has to be for the engine's own.
            on_progress: called with `pull` and the bytes of its layers.

        Raises:
            ImageUnavailable: it is not there, cannot be pulled, stands still for 60 s, or is for another platform.
            EngineUnavailable: the engine does not answer.
        """
        return await ensure_image(
            self._api, self.info, name, pull=pull, platform=platform, on_progress=on_progress
        )

    async def read_file(self, id: str, path: str, most: int) -> tuple[str, bytes]:
        """Return where a path of a container leads to, and the content if that is a file of at most `most` bytes.

        Raises:
            NotFound: there is no such container, or nothing at the path.
        """
        return await read_file(self._api, _path(id, "archive"), path, most)

    async def give_to_group(self, id: str, folder: str, group: int) -> None:
        """Let a group write what is in a folder of a container, and what will be: of one that has never run.

        A folder that belongs to the group already is left as it is; of one with more than 16 MiB nothing but itself is
        given.

        Raises:
            NotFound: there is no such container or folder. WorkspaceUnavailable: it is read-only.
        """
        await give_to_group(self._api, _path(id, "archive"), folder, group)

    def watch(self, id: str) -> Watch:
        """Watch the container with this full id, that exists already, for its end and other changes."""
        return self._events.watch(id)

    # --- volumes and networks ---

    async def volumes(self, by_label: Mapping[str, str | None]) -> list[dict[str, Any]]:
        """Return the volumes with these labels."""
        return list((await self._list("volumes", by_label)).get("Volumes") or ())

    async def networks(self, by_label: Mapping[str, str | None]) -> list[dict[str, Any]]:
        """Return the networks with these labels."""
        return list(await self._list("networks", by_label))

    async def create_volume(self, name: str, body: Mapping[str, Any]) -> None:
        """Make a volume; `body` as POST /volumes/create takes it. An existing one of this name is left as it is."""
        await self._make("volumes", {"Name": name, **body})

    async def create_network(self, name: str, body: Mapping[str, Any]) -> str:
        """Make a network and return its id; `body` as POST /networks/create takes it.

        Raises:
            WorkspaceUnavailable: the name is taken. EngineUnavailable: no addresses are left.
        """
        return str((await self._make("networks", {"Name": name, "CheckDuplicate": True, **body}))["Id"])

    async def remove_volume(self, name: str) -> None:
        """Remove a volume. One that is gone is fine.

        Raises:
            WorkspaceUnavailable: a container uses it.
        """
        await self._drop("volumes", name)

    async def remove_network(self, name: str) -> None:
        """Remove a network, by its name or id. One that is gone is fine.

        Raises:
            WorkspaceUnavailable: a container is connected to it.
        """
        await self._drop("networks", name)

    # --- how ---

    async def _signal(self, id: str, verb: str, seconds: float, **params: Any) -> None:
        what = f"{verb} the container {id[:12]}"
        try:
            await self._api.ask(
                "POST", _path(id, verb), what=what, seconds=seconds, params=params, again=True
            )
        except NotFound:
            pass
        except WorkspaceUnavailable as exc:
            if exc.details.get("status") != 409:  # "is not running"
                raise

    async def _freeze(self, id: str, verb: str, done: str) -> None:
        path = _path(id, verb)
        try:
            await self._api.ask("POST", path, what=f"{verb} the container {id[:12]}", again=True)
        except WorkspaceUnavailable as exc:
            if done not in exc.message:
                raise

    async def _list(self, kind: Kind, by_label: Mapping[str, str | None]) -> Any:
        params = {"filters": json.dumps(_by_label(by_label))}
        return await self._api.ask("GET", kind, what=f"list {kind}", params=params, again=True)

    async def _make(self, kind: Kind, body: Mapping[str, Any]) -> Any:
        what = f"create the {kind[:-1]} {body['Name']}"
        async with self._gate:
            return await self._api.ask("POST", f"{kind}/create", what=what, phase="create", body=body)

    async def _drop(self, kind: Kind, name: str) -> None:
        with suppress(NotFound):
            await self._api.ask(
                "DELETE", f"{kind}/{_plain(name)}", what=f"remove the {kind[:-1]} {name}", again=True
            )

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
            params = {"force": "1", "v": "1"}
            await self._api.ask("DELETE", _path(id), what="remove it", params=params)


async def engine_version(url: str | None = None) -> str:
    """Ask an engine for its version.

    Raises:
        EngineUnavailable: there is none, it may not be used, is too old, or does not answer within 10 s.
    """
    async with EngineApi(url) as api:
        return str(api.version.get("Version"))


def _path(id: str, verb: str = "") -> str:
    return f"containers/{_plain(id)}" + (f"/{verb}" if verb else "")


def _plain(name: str) -> str:
    """The name, unless it would lead elsewhere in the engine's API."""
    if not _NAME.fullmatch(name):
        raise NotFound(f"nothing on an engine can have the name {name[:64]!r}")
    return name


def _is_ours(container: Mapping[str, Any]) -> bool:
    """Whether its labels were made for it: they have its name."""
    return f"/{(container.get('Labels') or {}).get(labels.NAME)}" in (container.get("Names") or ())


def _by_label(by_label: Mapping[str, str | None]) -> dict[str, list[str]]:
    return {"label": [name if value is None else f"{name}={value}" for name, value in by_label.items()]}
