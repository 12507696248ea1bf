"""DockerWorkspace: a workspace on a server in a container that is started for it."""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from agent_sdk.ids import new_id
from agent_sdk.protocol.arguments import Gpus, Heartbeat, Label, Limit, Name, Path, Platform, Port
from agent_sdk.protocol.checks import OsText, checked
from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    PathDenied,
    PathNotFound,
    WorkspaceLost,
    WorkspaceUnavailable,
)
from agent_sdk.remote.connection import HEARTBEAT_SECONDS
from agent_sdk.remote.reconnecting import OnConnection
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.rpc.shield import to_its_end
from agent_sdk.workspace.environment import from_caller
from workspaces.backend.docker.labels import INSTANCE, OWNER, ROLE, SERVER
from workspaces.backend.docker.profiles import ServerSpec, Volume
from workspaces.backend.docker.reaper import Reaper
from workspaces.backend.records import is_dead, this_process

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine
    from workspaces.backend.docker.server_container import OnLog, OnProgress, ServerContainer

logger = logging.getLogger("workspaces")

WORKING_DIR = "/workspace"
SERVER_USER = 10_000
"""Of the image. Commands run as another one."""


class DockerWorkspace(RemoteWorkspace):
    """A workspace in a container of its own, on this machine's container engine or the one of DOCKER_HOST.

    Entering starts the container, waits until the server in it is ready, and connects. Leaving removes it, and so
    does a reaper process when this one is killed. Everything else is a RemoteWorkspace.
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
        """Describe it; nothing is asked for before `async with`.

        Args:
            server_image: an image with the server in it; `make image` makes `agent-server:latest`.
            host_port: port of 127.0.0.1 on which the server is published; None: a free one.
            volumes: `/host/folder:/folder[:ro]` or `volume:/folder[:ro]`. Commands run as the owner of the first
                folder that they may write, so what they write is that user's; unless it is root's.
            env: variables of the commands. The server itself does not see them.
            forward_env: names of variables of this process that the commands get, too, where they are set.
            network: one that exists; None: the engine's default.
            platform: e.g. `linux/amd64`; None: the engine's own.
            gpus: `all`, a number, or ids separated by commas.
            memory: a size like `2g`, at least 64m, without swap; None: no limit.
            cpus: how many it may use; None: no limit.
            pids: processes and threads at a time; None: 4096.
            ports: further ports of the container, published like the server's; see `port_url`.
            name: of the container; None: a fresh one. One of this name that was kept is used again as it is.
            keep: leave the container where it is; whoever enters a workspace with its name and without `keep`
                removes it in the end.
            pull: when the image is fetched.
            startup_timeout: seconds for everything until it can be used.
            docker_url: unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets.
            working_dir: an existing folder in the container; None: /workspace.
            conversation: id of an existing conversation in a container that was kept, whose workspace this is then.
            heartbeat, on_connection: see RemoteWorkspace.
            on_progress: called with phase (`engine`, `pull`, `create`, `start`, `ready`), done and total.
            on_log: called with each line that the server writes. They go to the logger `workspaces`, too.

        Raises:
            InvalidParams: something of it makes no sense, or contradicts something else.
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
        self._spec = ServerSpec(
            image=server_image,
            env={"AGENT_SERVER_FILES_ROOT": "/"},  # all of the container is the one client's
            name=name or f"agent-server-{new_id()}",
            command_env={**from_caller(forward_env), **(env or {})},
            volumes=tuple(Volume.parse(text) for text in volumes),
            network=network,
            host_port=host_port,
            ports=tuple(ports),
            platform=platform,
            gpus=gpus,
            memory=memory,
            cpus=cpus,
            pids=pids,
            pull=pull,
        )
        self._spec.check()
        self._keep = keep
        self._startup_timeout = startup_timeout
        self._docker_url = docker_url
        self._on_progress, self._on_log = on_progress, on_log
        self._container: ServerContainer | None = None

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
        if self._container is not None and self._is_paused and not self._keep:
            with suppress(AgentServerError):
                await self._container.resume()  # or closing the connection would wait for an answer
        await super().__aexit__()

    @property
    def container(self) -> str | None:
        """Name of the container; None before it was entered."""
        return self._container.name if self._container is not None else None

    async def port_url(self, port: Port) -> str:
        """Return where one of the further `ports` is reached, as a URL.

        Raises:
            WorkspaceUnavailable: it was not asked for, or the container does not run.
        """
        return await self._entered.port_url(port)

    async def pause(self) -> None:
        """Freeze the container. Calls wait until `resume`; a connection that is lost meanwhile is made again."""
        await self._entered.pause()
        self._is_paused = True

    async def resume(self) -> None:
        """Let it go on."""
        await self._entered.resume()
        self._is_paused = False

    @property
    def _entered(self) -> ServerContainer:
        if self._container is None:
            raise InvalidParams("the workspace is not open; enter it with `async with`")
        return self._container

    # --- its start ---

    async def _start(self, until: float) -> None:
        from workspaces.backend.docker.engine import Engine  # noqa: PLC0415  the engine's client costs 0.4 s

        async with self._in_time(until):
            engine = await self._stack.enter_async_context(Engine(self._docker_url))
            await _remove_leftovers(engine)
            container = await self._kept(engine) or await self._fresh(engine)
        self._container = container
        left = max(until - asyncio.get_running_loop().time(), 0.0)
        if container.id:
            await container.attach(left)
            await self._own(container)
        else:
            reaper = await self._own(container)
            await container.start(left)
            if self._keep and reaper is not None:
                await reaper.dismiss()
        gone: asyncio.Future[AgentServerError] = asyncio.get_running_loop().create_future()
        telling = asyncio.create_task(_tell_end(container, gone))
        self._stack.push_async_callback(_cancelled, telling)
        self._target = msgspec.structs.replace(
            self._target, url=container.url, api_key=container.api_key, direct=True, gone=gone
        )

    async def _kept(self, engine: Engine) -> ServerContainer | None:
        from workspaces.backend.docker.server_container import ServerContainer  # noqa: PLC0415

        found = await ServerContainer.find(engine, self._spec.name, on_log=self._log())
        if found is None:
            return None
        if found.spec.labels.get(OWNER):
            raise InvalidParams(
                f"name: a container {found.name} is in use by another client; choose another name"
            )
        if found.spec.image != self._spec.image:
            raise InvalidParams(
                f"name: the container {found.name} was kept with the image {found.spec.image}, "
                f"not {self._spec.image}; choose another name, or remove it: docker rm -f {found.name}"
            )
        return found

    async def _fresh(self, engine: Engine) -> ServerContainer:
        from workspaces.backend.docker.server_container import ServerContainer  # noqa: PLC0415

        owner = {} if self._keep else {OWNER: this_process()}
        spec = msgspec.structs.replace(
            self._spec,
            labels={INSTANCE: new_id(), **owner},
            box_user=await self._commands_user(engine),
        )
        return ServerContainer(engine, spec, on_progress=self._on_progress, on_log=self._log())

    async def _own(self, container: ServerContainer) -> Reaper | None:
        """Have it removed at the end, by us or by the reaper; one that is to be kept only until it is ready."""
        reaper = None
        if not (self._keep and container.url):
            instance = container.spec.labels[INSTANCE]
            reaper = await self._stack.enter_async_context(Reaper(instance, self._docker_url))

        async def end() -> None:
            try:
                if self._keep and container.url:
                    await container.let_go()
                else:
                    await container.stop()
                if reaper is not None:
                    await reaper.dismiss()
            except AgentServerError as exc:
                logger.warning("the container %s is left to the reaper: %s", container.name, exc)

        self._stack.push_async_callback(end)
        return reaper

    async def _commands_user(self, engine: Engine) -> int | None:
        """The owner of the first folder they may write; see that all folders are there, where we see them."""
        from workspaces.backend.docker.reach import find_reach  # noqa: PLC0415

        folders = [volume for volume in self._spec.volumes if volume.is_folder]
        if not folders or not (await find_reach(engine, self._spec.network)).is_here:
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
            phase = self._container.phase if self._container is not None else "engine"
            raise WorkspaceUnavailable(
                f"the server of {self._spec.image} was not ready after {self._startup_timeout:g} s "
                f"(phase {phase}); give it more with startup_timeout",
                phase=phase,
            ) from None

    def _log(self) -> OnLog:
        from workspaces.backend.docker.server_container import ServerLog  # noqa: PLC0415  structlog costs 60 ms

        return ServerLog(self._spec.name, self._on_log)


def _owner(volume: Volume) -> int:
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


async def _remove_leftovers(engine: Engine) -> None:
    """Remove what clients of this machine left whose reaper was killed, too."""
    with suppress(AgentServerError):
        for container in await engine.containers({OWNER: None, ROLE: SERVER}):
            if is_dead(container["Labels"][OWNER]):
                await engine.remove(container["Id"])


async def _tell_end(container: ServerContainer, gone: asyncio.Future[AgentServerError]) -> None:
    """Say why there will be no server any more, when its container has ended."""
    await asyncio.wait([container.died])
    gone.set_result(WorkspaceLost(await container.epitaph(), phase="run"))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
