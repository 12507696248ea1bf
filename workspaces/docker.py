"""DockerWorkspace: a workspace on a server in a container that is started for it."""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from agent_sdk.cancellation import to_its_end
from agent_sdk.ids import new_id
from agent_sdk.protocol.checks import (
    Gpus,
    Heartbeat,
    Label,
    Limit,
    Name,
    OsText,
    Path,
    Platform,
    Port,
    checked,
)
from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    NotFound,
    PathDenied,
    PathNotFound,
    WorkspaceLost,
    WorkspaceUnavailable,
)
from agent_sdk.remote.connection import HEARTBEAT_SECONDS
from agent_sdk.remote.reconnecting import OnConnection
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace.environment import check_environment, from_caller, packed
from workspaces.backend.contract import KEY_NAME, SERVER_PORT, Machine, Mount, parse_size
from workspaces.backend.docker.reaper import Reaper
from workspaces.backend.labels import INSTANCE, OWNER, PORT, ROLE, SERVER
from workspaces.backend.records import is_dead, this_process

if TYPE_CHECKING:
    from workspaces.backend.contract import Backend, OnProgress
    from workspaces.backend.docker.backend import DockerBackend
    from workspaces.backend.docker.engine import Engine
    from workspaces.server import OnLog, Server

logger = logging.getLogger("workspaces")

WORKING_DIR = "/workspace"
SERVER_USER = 10_000
"""Of the image. Commands run as another one."""


class DockerWorkspace(RemoteWorkspace):
    """A workspace in a container of its own, on this machine's container engine or the one of DOCKER_HOST.

    Entering starts the container, waits until the server in it is ready, and connects. Leaving removes the container;
    when this process is killed, a reaper process does. Everything else is as in RemoteWorkspace.
    """

    _is_paused = False

    @checked
    def __init__(
        self,
        server_image: Label = "agent-server:latest",
        *,
        host_port: Port | None = None,
        volumes: Iterable[OsText] = (),
        env: Mapping[OsText, OsText] | None = None,
        forward_env: Iterable[OsText] = (),
        network: Label | None = None,
        platform: Platform | None = None,
        gpus: Gpus | None = None,
        memory: str | None = None,
        cpus: float | None = None,
        pids: int | None = None,
        ports: Iterable[Port] = (),
        name: str | None = None,
        keep: bool = False,
        pull: Literal["missing", "always", "never"] = "missing",
        startup_timeout: Limit = 120.0,
        docker_url: OsText | None = None,
        working_dir: Path | None = None,
        conversation: Name | None = None,
        heartbeat: Heartbeat = HEARTBEAT_SECONDS,
        on_connection: OnConnection | None = None,
        on_progress: OnProgress | None = None,
        on_log: OnLog | None = None,
    ) -> None:
        """Describe the workspace; `async with` starts the container.

        Args:
            server_image: an image with the server in it; `make image` makes `agent-server:latest`.
            host_port: port of 127.0.0.1 on which the server is published; None: a free one.
            volumes: `/host/folder:/folder[:ro]` or `volume:/folder[:ro]`. Commands run as the owner of the first
                writable folder that is not root's, so that what they write belongs to that user; never as root.
            env: variables of the commands. The server itself does not see them.
            forward_env: names of variables of this process that the commands get, too, where they are set.
            network: one that exists; None: the engine's default.
            platform: e.g. `linux/amd64`; None: the engine's own.
            gpus: `all`, a number, or ids separated by commas.
            memory: a size like `2g`, at least 64m, without swap; None: no limit.
            cpus: processors that the container may use, e.g. 1.5; None: no limit.
            pids: processes and threads at a time; None: 4096.
            ports: further ports of the container, published like the server's; `port_url` says where.
            name: of the container; None: a fresh one. A kept container of this name is used again as it is.
            keep: leave the container at the end. Entering a workspace of its name without `keep` removes the container
                when that workspace is left.
            pull: when the image is fetched.
            startup_timeout: seconds for everything until it can be used.
            docker_url: unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets.
            working_dir: an existing folder in the container; None: /workspace.
            conversation: id of an existing conversation in a container that was kept, whose workspace this is then.
            heartbeat, on_connection: as for RemoteWorkspace.
            on_progress: called with phase (`engine`, `pull`, `create`, `start`, `ready`), done and total.
            on_log: called with each line that the server writes. They go to the logger `workspaces`, too.

        Raises:
            InvalidParams: an argument is not acceptable, or contradicts another.
        """
        super().__init__(
            "unix:///",
            working_dir=working_dir or (WORKING_DIR if conversation is None else None),
            conversation=conversation,
            connect_timeout=startup_timeout,
            heartbeat=heartbeat,
            on_connection=on_connection,
        )
        self._target = msgspec.structs.replace(self._target, url=f"docker:{server_image}")
        if keep and name is None:
            raise InvalidParams("keep: a container that is kept needs a name, by which it is found again")
        self._machine = Machine(
            name=name or f"agent-server-{new_id()}",
            labels={INSTANCE: new_id(), **({} if keep else {OWNER: this_process()})},
            image=server_image,
            env=_environment({**from_caller(forward_env), **(env or {})}),
            secret_env={KEY_NAME: secrets.token_urlsafe(32)},
            mounts=tuple(Mount.parse(text) for text in volumes),
            network=network,
            host_port=host_port,
            ports=(SERVER_PORT, *ports),
            platform=platform,
            gpus=gpus,
            memory=None if memory is None else parse_size("memory", memory, least="64m"),
            cpus=cpus,
            pids=pids,
            pull=pull,
        )
        self._keep = keep
        self._startup_timeout = startup_timeout
        self._docker_url = docker_url
        self._on_progress, self._on_log = on_progress, on_log
        self._server: Server | None = None

    async def __aenter__(self) -> Self:
        """Start it, and connect.

        Raises:
            EngineUnavailable, ImageUnavailable, WorkspaceUnavailable: with phase, cause and mend; nothing is left.
            InvalidParams, PathNotFound, PathDenied: a name, network, volume or path that cannot be used.
        """
        if self._link is None:
            until = asyncio.get_running_loop().time() + self._startup_timeout
            try:
                await self._start(until)
                async with self._in_time(until):
                    await super().__aenter__()
            except BaseException:
                await to_its_end(self._stack.aclose())
                raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await to_its_end(self._leave())

    async def _leave(self) -> None:
        if self._server is not None and self._is_paused and not self._keep:
            with suppress(AgentServerError):
                await self._server.resume()  # or closing the connection would wait for an answer
        await super().__aexit__()

    @property
    def container(self) -> str | None:
        """Name of the container; None before it was entered."""
        return self._machine.name if self._server is not None else None

    async def port_url(self, port: Port) -> str:
        """Return where one of the further `ports` is reached, as a URL.

        Raises:
            WorkspaceUnavailable: the port is not one of `ports`, or the container does not run.
        """
        return await self._entered.port_url(port)

    async def pause(self) -> None:
        """Freeze the container. Calls wait until `resume`; a connection that is lost meanwhile is made again."""
        await self._entered.pause()
        self._is_paused = True

    async def resume(self) -> None:
        """Let the frozen container go on."""
        await self._entered.resume()
        self._is_paused = False

    @property
    def _entered(self) -> Server:
        if self._server is None:
            raise InvalidParams("the workspace is not open; enter it with `async with`")
        return self._server

    # --- its start ---

    async def _start(self, until: float) -> None:
        from workspaces.backend.docker.backend import DockerBackend  # noqa: PLC0415  its client costs 0.4 s
        from workspaces.backend.docker.engine import Engine  # noqa: PLC0415

        async with self._in_time(until):
            engine = await self._stack.enter_async_context(Engine(self._docker_url))
            backend = DockerBackend(engine)
            await _remove_leftovers(backend)
            kept, machine = await self._kept(backend)
            if kept is None and (user := await self._commands_user(engine)) is not None:
                env = {**machine.env, "AGENT_SERVER_BOX_USER": str(user)}
                machine = msgspec.structs.replace(machine, env=env)
            server = self._server = self._described(backend, machine)
            reaper = await self._own(server, kept=False) if kept is None else None
        left = max(until - asyncio.get_running_loop().time(), 0.0)
        if kept is not None:
            self._stack.push_async_callback(server.let_go)
            await server.attach(kept, left)
            async with self._in_time(until):
                await self._own(server, kept=True)  # not before: one that does not go on now is still kept
        else:
            await server.start(left)
            if self._keep and reaper is not None:
                await reaper.dismiss()
        gone: asyncio.Future[AgentServerError] = asyncio.get_running_loop().create_future()
        telling = asyncio.create_task(_tell_end(server, gone))
        self._stack.push_async_callback(_cancelled, telling)
        self._target = msgspec.structs.replace(
            self._target, url=server.url, api_key=server.api_key, direct=True, gone=gone
        )

    async def _kept(self, backend: Backend) -> tuple[str | None, Machine]:
        """Return the id of the container of this name that can be used again, if there is one, and what it is."""
        name = self._machine.name
        try:
            found = await backend.inspect(name)
        except NotFound:
            return None, self._machine
        if found.labels.get(ROLE) != SERVER or KEY_NAME not in found.env:
            raise InvalidParams(
                f"name: the container {name} is no agent server that was started from here; choose another name"
            )
        if found.labels.get(OWNER):
            raise InvalidParams(f"name: a container {name} is in use by another client; choose another name")
        if found.image != self._machine.image:
            raise InvalidParams(
                f"name: the container {name} was kept with the image {found.image}, "
                f"not {self._machine.image}; choose another name, or remove it: docker rm -f {name}"
            )
        return found.id, msgspec.structs.replace(
            self._machine,
            labels=found.labels,
            secret_env={KEY_NAME: found.env[KEY_NAME]},
            ports=(int(found.labels.get(PORT, SERVER_PORT)), *self._machine.ports[1:]),
        )

    def _described(self, backend: DockerBackend, machine: Machine) -> Server:
        from workspaces.server import Server, ServerLog  # noqa: PLC0415  structlog costs 60 ms

        return Server(
            backend,
            machine,
            follow=backend.follow,
            on_progress=self._on_progress,
            on_log=ServerLog(machine.name, self._on_log),
        )

    async def _own(self, server: Server, *, kept: bool) -> Reaper | None:
        """Have it removed at the end, by us or by the reaper; one that is to be kept only until it is ready."""
        reaper = None
        if not (self._keep and kept):
            instance = server.machine.labels[INSTANCE]
            reaper = await self._stack.enter_async_context(Reaper(instance, self._docker_url))

        async def end() -> None:
            try:
                if self._keep and (kept or server.url):
                    await server.let_go()
                else:
                    await server.stop()
                if reaper is not None:
                    await reaper.dismiss()
            except AgentServerError as exc:
                logger.warning("the container %s is left to the reaper: %s", self._machine.name, exc)

        self._stack.push_async_callback(end)
        return reaper

    async def _commands_user(self, engine: Engine) -> int | None:
        """The owner of the first folder they may write; see that all folders are there, where we see them."""
        from workspaces.backend.docker.reach import find_reach  # noqa: PLC0415

        folders = [mount for mount in self._machine.mounts if mount.is_folder]
        if not folders or not (await find_reach(engine, self._machine.network)).is_here:
            return None
        owners = [(volume, _owner(volume)) for volume in folders]
        writable = [(volume, owner) for volume, owner in owners if not volume.read_only]
        shifted = any(option in ("name=rootless", "name=userns") for option in engine.info.security_options)
        for volume, owner in writable:
            if owner not in (0, SERVER_USER) and not shifted:
                return owner
            logger.warning(
                "volumes: %s belongs to user %d, as whom commands cannot run: they may be unable to write there",
                volume.source,
                owner,
            )
        return None

    @asynccontextmanager
    async def _in_time(self, until: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(until) as limit:
                yield
        except TimeoutError as exc:
            if isinstance(exc, AgentServerError) or not limit.expired():
                raise
            phase = self._server.phase if self._server is not None else "engine"
            raise WorkspaceUnavailable(
                f"the server of {self._machine.image} was not ready after {self._startup_timeout:g} s "
                f"(phase {phase}); give it more with startup_timeout",
                phase=phase,
            ) from None


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """That of a server whose commands have these variables; all of its container is the one client's."""
    check_environment(variables)
    return {"AGENT_SERVER_FILES_ROOT": "/", **(packed(variables) if variables else {})}


def _owner(volume: Mount) -> int:
    path = pathlib.Path(volume.source)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise PathNotFound(f"volumes: no such folder: {path}; make it first", path=str(path)) from None
    except OSError as exc:
        raise PathDenied(f"volumes: {path} cannot be used: {exc.strerror}", path=str(path)) from None
    if not os.access(path, os.R_OK):
        raise PathDenied(f"volumes: {path} cannot be read by this user", path=str(path))
    return found.st_uid


async def _remove_leftovers(backend: Backend) -> None:
    """Remove what clients of this machine left whose reaper was killed, too."""
    with suppress(AgentServerError):
        for found in await backend.list({OWNER: None, ROLE: SERVER}):
            if is_dead(found.labels[OWNER]):
                await backend.stop(found.id)


async def _tell_end(server: Server, gone: asyncio.Future[AgentServerError]) -> None:
    """Say why there will be no server any more, when its container has ended."""
    await server.ended()
    gone.set_result(WorkspaceLost(server.epitaph(), phase="run"))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
