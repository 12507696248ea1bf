"""A workspace on a server that is started for it, on a machine of any backend, and goes when it is left."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import msgspec

from agent_sdk.cancellation import cancel_and_wait, to_its_end
from agent_sdk.ids import new_id
from agent_sdk.protocol.checks import (
    Gpus,
    Heartbeat,
    Limit,
    Name,
    Options,
    OsText,
    Path,
    Platform,
    Port,
    whole,
)
from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    NotFound,
    WorkspaceLost,
    WorkspaceUnavailable,
)
from agent_sdk.remote.connection import HEARTBEAT_SECONDS
from agent_sdk.remote.reconnecting import OnConnection
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace.environment import check_environment, from_caller, packed
from workspaces.backend.contract import KEY_NAME, SERVER_PORT, Backend, Machine, OnProgress, parse_size
from workspaces.backend.labels import INSTANCE, OWNER, PORT, ROLE, SERVER
from workspaces.backend.records import is_dead, this_process
from workspaces.server import Follow, OnLog, Server

logger = logging.getLogger("workspaces")

WORKING_DIR = "/workspace"
_LEVELS = {"debug", "info", "warning", "error", "critical"}
_TRUE_IN_ITS_MACHINE = {"network_reachable", "host_names_refused"}
"""Warnings about an address that leads no further than to this machine."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StartOptions(Options):
    """What is said of a server that is started for a workspace, whatever machine it runs on."""

    env: Mapping[OsText, OsText] | None = None
    forward_env: Iterable[OsText] = ()
    platform: Platform | None = None
    gpus: Gpus | None = None
    memory: str | None = None
    cpus: float | None = None
    pids: int | None = None
    ports: Iterable[Port] = ()
    name: str | None = None
    keep: bool = False
    pull: Literal["missing", "always", "never"] = "missing"
    startup_timeout: Limit = 120.0
    working_dir: Path | None = None
    conversation: Name | None = None
    heartbeat: Heartbeat = HEARTBEAT_SECONDS
    on_connection: OnConnection | None = None
    on_progress: OnProgress | None = None
    on_log: OnLog | None = None

    def machine(self, image: str, **further: Any) -> Machine:
        """Return the machine of the server, with what its backend alone knows.

        Raises:
            InvalidParams: it makes no sense.
        """
        variables = {**from_caller(self.forward_env), **(self.env or {})}
        check_environment(variables)
        return Machine(
            name=self.name or f"agent-server-{new_id()}",
            labels={INSTANCE: new_id(), **({} if self.keep else {OWNER: this_process()})},
            image=image,
            # All of its machine is the one client's.
            env={"AGENT_SERVER_FILES_ROOT": "/", **(packed(variables) if variables else {})},
            secret_env={KEY_NAME: secrets.token_urlsafe(32)},
            ports=(SERVER_PORT, *self.ports),
            platform=self.platform,
            gpus=self.gpus,
            memory=None if self.memory is None else parse_size("memory", self.memory, least="64m"),
            cpus=self.cpus,
            pids=self.pids,
            pull=self.pull,
            **further,
        )


class Reaper(Protocol):
    """Removes what a client has started when the client is gone without having done so itself."""

    async def dismiss(self) -> None:
        """Tell it that there is nothing to do, and wait until it has ended."""
        ...


class StartedWorkspace(RemoteWorkspace):
    """A workspace on a server that is started when it is entered, and is removed when it is left."""

    _kind = "machine"
    """What a person calls the machine."""
    _removal = ""
    """The command with which a person removes one."""
    _is_paused = False

    def __init__(self, options: StartOptions, machine: Machine, url: str) -> None:
        """Describe it.

        Args:
            options: what was said of it.
            machine: what the server runs on; `Machine.image` says which server.
            url: by which the workspace is known before there is a server.
        """
        super().__init__(
            "unix:///",
            working_dir=options.working_dir or (WORKING_DIR if options.conversation is None else None),
            conversation=options.conversation,
            connect_timeout=options.startup_timeout,
            heartbeat=options.heartbeat,
            on_connection=options.on_connection,
        )
        self._target = msgspec.structs.replace(self._target, url=url)
        if options.keep and not options.name:
            raise InvalidParams(f"keep: a {self._kind} that is kept needs a name, by which it is found again")
        self._started = options
        self._machine = machine
        self._server: Server | None = None

    async def __aenter__(self) -> Self:
        """Start it, and connect.

        Raises:
            EngineUnavailable, ImageUnavailable, WorkspaceUnavailable: with phase, cause and mend; nothing is left.
            InvalidParams, PathNotFound, PathDenied: a name, network, volume or path that cannot be used.
        """
        if self._link is None:
            until = asyncio.get_running_loop().time() + self._started.startup_timeout
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
        if self._server is not None and self._is_paused and not self._started.keep:
            with suppress(AgentServerError):
                await self._server.resume()  # or closing the connection would wait for an answer
        await super().__aexit__()

    async def port_url(self, port: Port) -> str:
        """Return where one of the further `ports` is reached, as a URL.

        Raises:
            WorkspaceUnavailable: the port is not one of `ports`, or the machine does not run.
        """
        return await self._entered.port_url(port)

    async def pause(self) -> None:
        """Let nothing in the machine run. Calls wait until `resume`; a connection that is lost is made again."""
        await self._entered.pause()
        self._is_paused = True

    async def resume(self) -> None:
        """Let the paused machine go on."""
        await self._entered.resume()
        self._is_paused = False

    @property
    def _entered(self) -> Server:
        if self._server is None:
            raise InvalidParams("the workspace is not open; enter it with `async with`")
        return self._server

    # --- what each kind says ---

    async def _reach(self) -> tuple[Backend, Follow | None]:
        """Return its backend, open as long as the workspace, and what reads the lines that its machines write."""
        raise NotImplementedError

    async def _completed(self, machine: Machine) -> Machine:
        """Return the machine with what can be known only once the backend is reached."""
        return machine

    def _reaper(self, instance: str) -> AbstractAsyncContextManager[Reaper]:
        """Return what removes the machine with this label when this process is gone, from its entering on."""
        raise NotImplementedError

    # --- its start ---

    async def _start(self, until: float) -> None:
        async with self._in_time(until):
            backend, follow = await self._reach()
            await _remove_leftovers(backend)
            kept, machine = await self._kept(backend)
            if kept is None:
                machine = await self._completed(machine)
            server = self._server = Server(
                backend,
                machine,
                follow=follow,
                on_progress=self._started.on_progress,
                on_log=ServerLog(machine.name, self._started.on_log),
            )
            reaper = await self._own(server, kept=False) if kept is None else None
        left = max(until - asyncio.get_running_loop().time(), 0.0)
        if kept is not None:
            self._stack.push_async_callback(server.let_go)
            await server.attach(kept, left)
            async with self._in_time(until):
                await self._own(server, kept=True)  # not before: one that does not go on now is still kept
        else:
            await server.start(left)
            if self._started.keep and reaper is not None:
                await reaper.dismiss()
        gone: asyncio.Future[AgentServerError] = asyncio.get_running_loop().create_future()
        telling = asyncio.create_task(_tell_end(server, gone))
        self._stack.push_async_callback(cancel_and_wait, telling)
        self._target = msgspec.structs.replace(
            self._target, url=server.url, api_key=server.api_key, direct=True, gone=gone
        )

    async def _kept(self, backend: Backend) -> tuple[str | None, Machine]:
        """Return the id of the machine of this name that can be used again, if there is one, and what it is."""
        name, kind = self._machine.name, self._kind
        try:
            found = await backend.inspect(name)
        except NotFound:
            return None, self._machine
        if found.labels.get(ROLE) != SERVER or KEY_NAME not in found.env:
            raise InvalidParams(
                f"name: the {kind} {name} is no agent server that was started from here; choose another name"
            )
        if found.labels.get(OWNER):
            raise InvalidParams(f"name: a {kind} {name} is in use by another client; choose another name")
        if found.image != self._machine.image:
            raise InvalidParams(
                f"name: the {kind} {name} was kept with the image {found.image}, "
                f"not {self._machine.image}; choose another name, or remove it: {self._removal} {name}"
            )
        return found.id, msgspec.structs.replace(
            self._machine,
            labels=found.labels,
            secret_env={KEY_NAME: found.env[KEY_NAME]},
            ports=(whole(found.labels.get(PORT, "")) or SERVER_PORT, *self._machine.ports[1:]),
        )

    async def _own(self, server: Server, *, kept: bool) -> Reaper | None:
        """Have it removed at the end, by us or by the reaper; one that is to be kept only until it is ready."""
        reaper = None
        if not (self._started.keep and kept):
            reaper = await self._stack.enter_async_context(self._reaper(server.machine.labels[INSTANCE]))

        async def end() -> None:
            try:
                if self._started.keep and (kept or server.url):
                    await server.let_go()
                else:
                    await server.stop()
                if reaper is not None:
                    await reaper.dismiss()
            except AgentServerError as exc:
                logger.warning("the %s %s is left to the reaper: %s", self._kind, self._machine.name, exc)

        self._stack.push_async_callback(end)
        return reaper

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
                f"the server of {self._machine.image} was not ready after {self._started.startup_timeout:g} s "
                f"(phase {phase}); give it more with startup_timeout",
                phase=phase,
            ) from None


async def _remove_leftovers(backend: Backend) -> None:
    """Remove what clients of this machine left whose reaper was killed, too."""
    with suppress(AgentServerError):
        for found in await backend.list({OWNER: None, ROLE: SERVER}):
            if is_dead(found.labels[OWNER]):
                await backend.stop(found.id)


async def _tell_end(server: Server, gone: asyncio.Future[AgentServerError]) -> None:
    """Say why there will be no server any more, when its machine has ended."""
    await server.ended()
    gone.set_result(WorkspaceLost(server.epitaph(), phase="run"))


class ServerLog:
    """Called with each line that a server writes, for the log of whoever started it.

    The logger is `workspaces`: silent below a warning, unless the program says otherwise.
    """

    def __init__(self, container: str, further: OnLog | None = None) -> None:
        """Take the container's name, and who else is to be called."""
        import structlog  # noqa: PLC0415  costs 60 ms

        log = structlog.wrap_logger(
            logging.getLogger("workspaces"), wrapper_class=structlog.stdlib.BoundLogger
        )
        self._log = log.bind(container=container)
        self._further = further

    async def __call__(self, line: str) -> None:
        """Pass one line on: what the server said in JSON with its level and fields, all else as it is."""
        level, event, fields = _entry(line)
        level = "debug" if event in _TRUE_IN_ITS_MACHINE else level
        self._log.log(logging.getLevelNamesMapping()[level.upper()], event, **fields)
        if self._further is not None:
            waiting = self._further(line)
            if inspect.isawaitable(waiting):
                await waiting


def _entry(line: str) -> tuple[str, str, dict[str, Any]]:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        event, level = str(fields.pop("event")), str(fields.pop("level"))
    except (msgspec.DecodeError, RecursionError, KeyError):
        return "info", line, {}
    fields.pop("time", None)
    taken = {"container", "timestamp", "exc_info", "stack_info", "stack", "positional_args"}
    return (level if level in _LEVELS else "info"), event, {k: v for k, v in fields.items() if k not in taken}
