"""A container with an agent server in it: started until it accepts connections, paused, found again, removed."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

import msgspec
import structlog
from msgspec import Struct

from agent_sdk.protocol.errors import (
    AgentServerError,
    ImageUnavailable,
    InvalidParams,
    NotFound,
    WorkspaceUnavailable,
)
from agent_sdk.rpc.shield import to_its_end
from workspaces.backend.docker.engine import Death, Engine, Watch
from workspaces.backend.docker.labels import PORT, ROLE, SERVER
from workspaces.backend.docker.profiles import KEY_NAME, SERVER_PORT, ServerSpec
from workspaces.backend.docker.reach import Reach, find_reach

logger = logging.getLogger("workspaces")

OnProgress = Callable[[str, int, int | None], object]
"""Called with the phase (`engine`, `pull`, `create`, `start`, `ready`), how much of it is done, and of how much."""
OnLog = Callable[[str], Awaitable[None] | None]
"""Called with each line that the server writes."""
LAST_LINES = 20
OWN_IMAGE = "agent-server"
_KEY = f"{KEY_NAME}="
ANSWER_SECONDS = 2.0
_LEVELS = {"debug", "info", "warning", "error", "critical"}
_TRUE_IN_ITS_CONTAINER = {"network_reachable", "host_names_refused"}
"""Warnings about an address that leads no further than to this machine."""


class _Ready(Struct):
    """The line of `serve --json`."""

    url: str
    api_key_file: str | None
    pid: int


class ServerContainer:
    """One container: described, or found. `start` makes it, `stop` removes it, `let_go` leaves it to itself."""

    def __init__(
        self,
        engine: Engine,
        spec: ServerSpec,
        *,
        on_progress: OnProgress | None = None,
        on_log: OnLog | None = None,
        foreign: bool = False,
        patience: str = "startup_timeout",
    ) -> None:
        """Describe it; nothing is made before `start`.

        Args:
            engine: where it runs.
            spec: what it is.
            on_progress: told how far its start is.
            on_log: told each line that the server writes.
            foreign: it may be somebody else's server, which is ready when its `/health` answers.
            patience: the option that gives it more time to start, for the error that it was not enough.

        Raises:
            InvalidParams: the description makes no sense.
        """
        spec.check()
        self.spec = spec
        self.name = spec.name
        self.id = ""
        """Empty before it is made."""
        self.url = ""
        """Where the server is reached; empty before `start` has returned."""
        self.api_key = secrets.token_urlsafe(32)
        self.patience = patience
        self.phase = "engine"
        """How far its start is."""
        self._engine = engine
        self._on_progress = on_progress
        self._on_log = on_log
        self._foreign = foreign
        self._reach: Reach | None = None
        self._watch: Watch | None = None
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def find(cls, engine: Engine, name: str, *, on_log: OnLog | None = None) -> Self | None:
        """Return the container of this name, whoever started it and whether it runs or not; None: there is none.

        Its key is in its environment, which whoever may use the engine can read anyway.

        Raises:
            InvalidParams: there is one, and no agent server of ours in it.
            EngineUnavailable: the engine does not answer.
        """
        try:
            found = await engine.inspect(name)
        except NotFound:
            return None
        config = found["Config"]
        keys = [text.removeprefix(_KEY) for text in config["Env"] or () if text.startswith(_KEY)]
        if (config["Labels"] or {}).get(ROLE) != SERVER or not keys:
            raise InvalidParams(
                f"name: the container {name} is no agent server that was started from here; choose another name"
            )
        network = found["HostConfig"]["NetworkMode"]
        spec = ServerSpec(
            image=config["Image"],
            name=found["Name"].strip("/"),
            labels=config["Labels"],
            network=None if network in ("default", "bridge") else network,
            port=int((config["Labels"] or {}).get(PORT, SERVER_PORT)),
        )
        container = cls(engine, spec, on_log=on_log)
        container.id, container.api_key = found["Id"], keys[0]
        return container

    def __repr__(self) -> str:
        return f"<ServerContainer {self.name} {self.url or self.phase}>"

    @property
    def died(self) -> asyncio.Future[Death]:
        """Done when it has ended, by whatever. Valid once `start` or `attach` has returned."""
        assert self._watch is not None
        return self._watch.died

    # --- its start ---

    async def start(self, timeout: float = 120.0) -> None:
        """Make it and wait until the server in it accepts connections. Whatever raises, or a cancel, leaves nothing.

        Args:
            timeout: seconds for all of it, the pull of the image included.

        Raises:
            ImageUnavailable: the image is not there and cannot be pulled.
            InvalidParams: a network or a volume that cannot be used.
            WorkspaceUnavailable: it did not start, or was not ready in time; with phase and its last words.
            EngineUnavailable, IsolationUnavailable: the engine fails, or cannot do what is asked for.
        """
        await self._or_nothing(self._start(), timeout)

    async def attach(self, timeout: float = 30.0) -> None:
        """Use a container that was found: one that is paused or stopped goes on. What raises leaves it as it is.

        Raises:
            As `start`.
        """
        self._reach = await find_reach(self._engine, self.spec.network)
        try:
            async with asyncio.timeout(timeout):
                await self._go_on()
        except TimeoutError:
            await self.let_go()
            raise WorkspaceUnavailable(
                f"the container {self.name} did not go on within {round(timeout, 1):g} s", phase=self.phase
            ) from None
        except BaseException:
            await self.let_go()
            raise

    async def _start(self) -> None:
        self._tell("engine", 0, 1)
        self._reach = await find_reach(self._engine, self.spec.network)
        await self._check_volumes()
        self._tell("engine", 1, 1)
        self.phase = "pull"
        await self._have_image()
        self._tell("create", 0, 1)
        body = msgspec.structs.replace(self.spec, network=self._reach.network).body(
            self.api_key, self._reach.bind
        )
        self.id = await self._engine.create(self.name, body, platform=self.spec.platform)
        if self.spec.group is not None:
            for volume in self.spec.volumes:
                await self._engine.give_to_group(self.id, volume.target, self.spec.group)
        self._tell("create", 1, 1)
        await self._run()

    async def _have_image(self) -> None:
        """Pull the image where it is missing. Nobody publishes ours under its own name: that one is made."""
        spec = self.spec
        own = spec.image.partition(":")[0] == OWN_IMAGE
        pull = "never" if own else spec.pull
        try:
            await self._engine.image(spec.image, pull=pull, platform=spec.platform, on_progress=self._tell)
        except ImageUnavailable as exc:
            if not own:
                raise
            raise ImageUnavailable(f"{exc}; make it: make image", **exc.details) from None

    async def _run(self) -> None:
        """Start what was made, until it is ready or has ended."""
        self._tell("start", 0, 1)
        self._watch = self._engine.watch(self.id)
        await self._engine.start(self.id)
        self._tell("start", 1, 1)
        self._tell("ready", 0, 1)
        if self._foreign:
            await self._reached()
            await self.answers()
        else:
            await self._is_ready()
            await self._reached()
        self._tell("ready", 1, 1)

    async def _is_ready(self) -> None:
        """Wait until the server says that it accepts connections."""
        ready = asyncio.get_running_loop().create_future()
        self._following = asyncio.create_task(self._follow(ready))
        await asyncio.wait({ready, self.died}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise WorkspaceUnavailable(await self._ended(self.died.result()), phase="ready")

    async def answers(self) -> None:
        """Wait until `/health` answers; what it said when it was ready the last time is no sign of it.

        Raises:
            WorkspaceUnavailable: it ended; with its last words.
        """
        asking = asyncio.create_task(_healthy(self.url))
        self.died.add_done_callback(lambda _: asking.cancel())
        try:
            await asking
        except asyncio.CancelledError:
            if not self.died.done():
                raise
            raise WorkspaceUnavailable(await self.epitaph(), phase="ready") from None

    async def _go_on(self) -> None:
        state = (await self._engine.inspect(self.id))["State"]
        if state["Paused"]:
            await self._engine.unpause(self.id)
        if not state["Running"]:
            self._tell("start", 0, 1)
            await self._engine.start(self.id)
            self._tell("start", 1, 1)
        self._watch = self._engine.watch(self.id)  # not before: one that has ended is dead
        if self._on_log is not None:
            self._following = asyncio.create_task(self._follow())
        await self._reached()

    async def _reached(self) -> None:
        assert self._reach is not None
        found = await self._engine.inspect(self.id)
        if not found["State"]["Running"]:
            await asyncio.wait({self.died})
            raise WorkspaceUnavailable(await self.epitaph(), phase="ready")
        self.url = self._reach.url(found, self.spec.port)

    async def _or_nothing(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds) as limit:
                await work
        except TimeoutError as exc:
            if not limit.expired():
                raise
            words = await self.last_words() if self.id else ""
            await self._stop_quietly()
            raise WorkspaceUnavailable(
                f"the server of {self.spec.image} was not ready in time (phase {self.phase}){_said(words)}; "
                f"give it more with {self.patience}",
                phase=self.phase,
            ) from exc
        except BaseException:
            await self._stop_quietly()
            raise

    async def _check_volumes(self) -> None:
        """A named volume that does not exist would be made by the engine, and stay."""
        wanted = {volume.source for volume in self.spec.volumes if not volume.is_folder}
        missing = wanted - {volume["Name"] for volume in await self._engine.volumes({})} if wanted else None
        if missing:
            name = min(missing)
            raise InvalidParams(f"volumes: there is no volume {name}; make it: docker volume create {name}")

    async def _follow(self, ready: asyncio.Future[None] | None = None) -> None:
        """Pass the server's lines on; the one that says that it is ready is not for people."""
        with suppress(AgentServerError):  # its end is noticed elsewhere
            async for line in self._engine.follow_logs(self.id, since_now=ready is None):
                if _is_ready(line):
                    if ready is not None and not ready.done():
                        ready.set_result(None)
                    if self._on_log is None:
                        return
                elif self._on_log is not None:
                    await self._pass_on(self._on_log, line)

    async def _pass_on(self, told: OnLog, line: str) -> None:
        try:
            waiting = told(line)
            if inspect.isawaitable(waiting):
                await waiting
        except Exception:  # it is the user's; its error must not end the server
            logger.exception("on_log failed")

    def _tell(self, phase: str, done: int, total: int | None) -> None:
        self.phase = phase
        if self._on_progress is not None:
            try:
                self._on_progress(phase, done, total)
            except Exception:  # as above
                logger.exception("on_progress failed")

    # --- its life ---

    async def port_url(self, port: int) -> str:
        """Return where one of its further ports is reached, as a URL.

        Raises:
            WorkspaceUnavailable: it was not asked for, or the container does not run.
        """
        assert self._reach is not None
        return self._reach.url(await self._engine.inspect(self.id), port)

    async def pause(self) -> None:
        """Let nothing in it run until `resume`; connections stay, and calls wait.

        Raises:
            NotFound, WorkspaceUnavailable: it is gone, or does not run.
        """
        await self._engine.pause(self.id)

    async def resume(self) -> None:
        """Let it go on.

        Raises:
            NotFound, WorkspaceUnavailable: it is gone, or does not run.
        """
        await self._engine.unpause(self.id)

    async def last_words(self) -> str:
        """Return the end of what it wrote, as one line; empty when nothing is known."""
        lines = (await self._engine.logs(self.id, LAST_LINES)).splitlines()
        return " | ".join(line.strip() for line in lines if line.strip())

    # --- its end ---

    async def stop(self) -> None:
        """Remove it with everything in it. A cancel waits for that.

        Raises:
            EngineUnavailable: the engine does not answer, and it may still be there.
        """
        await to_its_end(self._stop())

    async def let_go(self) -> None:
        """Leave it as it is: it can be found again."""
        if self._watch is not None:
            self._watch.close()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def _stop(self) -> None:
        await self.let_go()
        if self.id:
            await self._engine.remove(self.id)

    async def _stop_quietly(self) -> None:
        with suppress(AgentServerError):  # there is an error already that says more
            await self.stop()

    async def epitaph(self) -> str:
        """Return why it ended, and its last words, as one sentence. Only when `died` is done."""
        return await self._ended(self.died.result())

    async def _ended(self, death: Death) -> str:
        return f"the server in {self.spec.image} ended: {death.reason}{_said(await self.last_words())}"


def _is_ready(line: str) -> bool:
    try:
        msgspec.json.decode(line, type=_Ready)
    except msgspec.DecodeError:
        return False
    return True


def _said(words: str) -> str:
    return f"; it said: {words}" if words else "; it said nothing"


async def _healthy(url: str) -> None:
    """Ask a server until it answers; whoever waits for that says how long."""
    import aiohttp  # noqa: PLC0415  costs 0.3 s; see RuntimeClient
    from tenacity import (  # noqa: PLC0415
        AsyncRetrying,
        retry_if_exception_type,
        wait_random_exponential,
    )

    retrying = AsyncRetrying(
        wait=wait_random_exponential(multiplier=0.05, max=0.5),
        retry=retry_if_exception_type((aiohttp.ClientError, OSError, TimeoutError)),
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_SECONDS)) as http:

        async def ask() -> None:
            async with http.get(f"{url}/health", raise_for_status=True, allow_redirects=False):
                pass

        await retrying(ask)


class ServerLog:
    """Called with each line that a server writes, for the log of whoever started it.

    The logger is `workspaces`: silent below a warning, unless the program says otherwise.
    """

    def __init__(self, container: str, further: OnLog | None = None) -> None:
        """Take the container's name, and who else is to be called."""
        log = structlog.wrap_logger(
            logging.getLogger("workspaces"), wrapper_class=structlog.stdlib.BoundLogger
        )
        self._log = log.bind(container=container)
        self._further = further

    async def __call__(self, line: str) -> None:
        """Pass one line on: what the server said in JSON with its level and fields, all else as it is."""
        level, event, fields = _entry(line)
        level = "debug" if event in _TRUE_IN_ITS_CONTAINER else level
        self._log.log(logging.getLevelNamesMapping()[level.upper()], event, **fields)
        if self._further is not None:
            waiting = self._further(line)
            if inspect.isawaitable(waiting):
                await waiting


def _entry(line: str) -> tuple[str, str, dict[str, Any]]:
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
        event, level = str(fields.pop("event")), str(fields.pop("level"))
    except (msgspec.DecodeError, KeyError):
        return "info", line, {}
    fields.pop("time", None)
    taken = {"container", "timestamp", "exc_info", "stack_info", "stack", "positional_args"}
    return (level if level in _LEVELS else "info"), event, {k: v for k, v in fields.items() if k not in taken}
