"""APIRemoteWorkspace: a workspace on a server that a Runtime API starts, or has started already."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from agent_sdk.cancellation import to_its_end
from agent_sdk.ids import new_id
from agent_sdk.protocol.checks import Heartbeat, Label, Limit, Name, Options, OsText, Path, Patience, taking
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, RemoteApiError
from agent_sdk.remote.connection import HEARTBEAT_SECONDS, checked_url
from agent_sdk.remote.reconnecting import OnConnection, ServerLink
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace.environment import from_caller, packed
from workspaces.runtime_client import RuntimeClient, Session, may_pass

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = logging.getLogger("workspaces")

FACTORS = (1, 2, 4, 8)
WAIT_SECONDS = 20.0
"""How long a Runtime API that can do that holds its answer back until something has changed."""
END_SECONDS = 30.0
END_TRIES = 3
FIRST_SECONDS, LONGEST_SECONDS = 0.2, 5.0
_ALWAYS: Mapping[str, Any] = {
    "command": "/opt/agent-server/bin/start serve --host 0.0.0.0 --port 60000 --json",
    "working_dir": "/",
    "run_as_user": 10_001,
    "fs_group": 10_001,
}
"""For Runtime APIs that want to be told; ours knows."""

OnProgress = Callable[[str, int, int | None], object]
"""Called with the phase (`attach`, `start`, `resume`, `ready`), 0 or 1, and 1."""


@dataclass(frozen=True, eq=False, repr=False)
class APIOptions(Options):
    """What is said of an APIRemoteWorkspace."""

    runtime_api_url: str
    runtime_api_key: str
    server_image: Label
    _: KW_ONLY
    ssl: SSLContext | None = None
    session_id: Label | None = None
    resource_factor: int = 1
    runtime_class: Label | None = None
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    env: Mapping[OsText, OsText] | None = None
    forward_env: Iterable[OsText] = ()
    keep_alive: bool = False
    pause_on_close: bool = False
    startup_timeout: Limit = 300.0
    connect_timeout: Patience = 30.0
    api_timeout: Limit = 60.0
    working_dir: Path | None = None
    conversation: Name | None = None
    heartbeat: Heartbeat = HEARTBEAT_SECONDS
    on_connection: OnConnection | None = None
    on_progress: OnProgress | None = None

    def body(self, session_id: str) -> dict[str, Any]:
        """Return what a Runtime API is asked to start.

        Others set variables for the server alone, which hands on what is packed; and they pass on the Host that clients
        ask for, which the server cannot know.
        """
        for_commands = {**from_caller(self.forward_env), **(self.env or {})}
        handed_on = packed(for_commands) if for_commands else {}
        return {
            **_ALWAYS,
            "image": self.server_image,
            "environment": {**for_commands, **handed_on, "AGENT_SERVER_ALLOW_HOSTS": "*"},
            "session_id": session_id,
            "image_pull_policy": self.image_pull_policy,
            **({"runtime_class": self.runtime_class} if self.runtime_class else {}),
            **({"resource_factor": self.resource_factor} if self.resource_factor != 1 else {}),
        }


class APIRemoteWorkspace(RemoteWorkspace):
    """A workspace on a server of its own, somewhere; a Runtime API starts it, pauses it and ends it.

    Entering attaches to the runtime of the session, or starts one, and waits until it is ready. A paused one is
    resumed; when that fails the error says so, and no other runtime takes its place. Leaving ends it, unless it
    is to be kept or paused. Everything else is a RemoteWorkspace.
    """

    @taking(APIOptions)
    def __init__(self, options: APIOptions) -> None:
        """Describe the workspace; `async with` starts the runtime, or attaches to it.

        Args:
            runtime_api_url: where the Runtime API is.
            runtime_api_key: its key. It is sent there and nowhere else.
            server_image: an image with the server in it.
            session_id: the id of an existing session, or one under which to find the new session again; None: a
                fresh one.
            resource_factor: 1, 2, 4 or 8 times what the Runtime API gives a runtime.
            runtime_class: e.g. `gvisor`; None: what the Runtime API prefers.
            image_pull_policy: when the image is fetched.
            env, forward_env: variables of the commands, and names of those of this process that they get as well.
            keep_alive: leave the runtime as it is at the end.
            pause_on_close: pause it at the end, so that the session can be resumed later.
            startup_timeout: seconds for everything until it can be used.
            connect_timeout: seconds for which a Runtime API that has not answered yet is asked again.
            api_timeout: seconds for one call of the Runtime API.
            working_dir: an existing folder there; None: a fresh one.
            conversation: id of an existing conversation in that runtime, whose workspace this is then.
            ssl, heartbeat, on_connection: as for RemoteWorkspace.
            on_progress: called with phase, done and total.

        Raises:
            InvalidParams: an argument is not acceptable.
        """
        super().__init__(
            checked_url(options.runtime_api_url, "runtime_api_url"),
            ssl=options.ssl,
            working_dir=options.working_dir,
            conversation=options.conversation,
            connect_timeout=options.startup_timeout,
            heartbeat=options.heartbeat,
            on_connection=self._connection_changed,
        )
        if options.resource_factor not in FACTORS:
            raise InvalidParams(f"resource_factor must be 1, 2, 4 or 8 (got {options.resource_factor})")
        if options.keep_alive and options.pause_on_close:
            raise InvalidParams("keep_alive and pause_on_close contradict each other; set one of them")
        self.session_id = options.session_id or f"agent-server-{new_id()}"
        """Give it to another workspace, and that one attaches to the same runtime."""
        self._options = options
        self._api = RuntimeClient(
            options.runtime_api_url, options.runtime_api_key, timeout=options.api_timeout, ssl=options.ssl
        )
        self._body = options.body(self.session_id)
        self._at_close = None if options.keep_alive else "pause" if options.pause_on_close else "stop"
        self._undo: str | None = None
        """What makes undone that this has begun."""
        self._seen: Session | None = None
        self._problem: RemoteApiError | None = None
        """Why it is tried again."""
        self._inquiry: asyncio.Task[None] | None = None
        """Asks what became of the runtime, while there is no connection to it."""

    async def __aenter__(self) -> Self:
        """Attach or start, wait until it is ready, and connect.

        Raises:
            RemoteApiError: the Runtime API refuses, fails, or its runtime does not become ready; what was begun
                here is undone. Details: phase, status.
            Unauthorized, ConnectionLost, …: see RemoteWorkspace.
        """
        if self._link is None:
            try:
                async with self._in_time() as until:
                    await self._open(until)
                    await super().__aenter__()
            except BaseException:
                await self._stack.aclose()
                raise
            self._undo = self._at_close
        return self

    @property
    def runtime_id(self) -> str | None:
        """Id of the runtime; None before it was entered."""
        return self._seen.runtime_id if self._seen is not None else None

    async def pause(self) -> None:
        """Pause the runtime: nothing in it runs until `resume`, and calls wait.

        Raises:
            RemoteApiError: it cannot be paused.
        """
        await self._api.verb("pause", self._entered.runtime_id, timeout=END_SECONDS)

    async def resume(self) -> None:
        """Let the runtime go on, and wait until it is ready.

        Raises:
            RemoteApiError: it does not go on; its phase is `resume`.
        """
        before = self._entered
        async with self._in_time():
            await self._api.verb("resume", before.runtime_id, timeout=self._options.startup_timeout)
            now = await self._persistently(self._look)
        if isinstance(self._link, ServerLink):
            self._link.retry_now()
        if (now.url, now.api_key) != (before.url, before.api_key):
            raise RemoteApiError(
                f"the runtime of session {self.session_id} came back at another address; enter it again",
                phase="resume",
            )

    @property
    def _entered(self) -> Session:
        if self._link is None or self._seen is None:
            raise InvalidParams("the workspace is not open; enter it with `async with`")
        return self._seen

    # --- its start ---

    async def _open(self, until: float) -> None:
        self._seen = self._undo = None
        self._gone: asyncio.Future[AgentServerError] = asyncio.get_running_loop().create_future()
        await self._stack.enter_async_context(self._api)
        self._stack.push_async_callback(self._end)
        self._stack.callback(self._end_inquiry)
        await self._persistently(self._obtain)
        self._tell("ready", 0)
        session = await self._persistently(self._look)
        self._tell("ready", 1)
        left = until - asyncio.get_running_loop().time()
        self._target = msgspec.structs.replace(
            self._target,
            url=session.url,
            api_key=session.api_key,
            connect_timeout=max(left, 0.1),
            gone=self._gone,
        )

    async def _obtain(self) -> Session:
        """Find the runtime of the session and make it run, or start one where there never was any."""
        self._tell("attach", 0)
        found = await self._api.session(self.session_id)
        if found is None and self._seen is not None:
            raise RemoteApiError(
                f"the session {self.session_id} is gone; another runtime would not have its files",
                phase="attach",
            )
        if found is None:
            self._undo = "stop"
            self._tell("start", 0)
            return await self._api.start(self._body, timeout=self._options.startup_timeout)
        known = self._note(found)
        if known.status == "running":
            return known
        self._undo = self._undo or "pause"
        if known.status == "paused":
            self._tell("resume", 0)
            await self._api.verb("resume", known.runtime_id, timeout=self._options.startup_timeout)
            return known
        self._tell("start", 0)
        return await self._api.start(self._body, timeout=self._options.startup_timeout)

    async def _look(self) -> Session | None:
        """Return the session when its runtime is ready, None while that may still come."""
        found = await self._api.session(self.session_id, wait=WAIT_SECONDS)
        if found is None:
            raise RemoteApiError(f"the session {self.session_id} is gone", phase="ready", status=404)
        session = self._note(found)
        match session.pod_status:
            case "ready":
                if not session.url.startswith(("http://", "https://")):
                    raise RemoteApiError(
                        f"{self._api.url} says no url of the runtime (got {session.url[:100]!r})",
                        phase="ready",
                    )
                return session
            case "failed" | "unknown":
                raise RemoteApiError(f"the runtime did not start{_state(session)}", phase="ready")
            case "crashloopbackoff":
                raise RemoteApiError(
                    f"the runtime crashed again and again, maybe for want of memory{_state(session)}",
                    phase="ready",
                )
        return None

    def _note(self, session: Session) -> Session:
        """Remember a session; what an answer leaves out is as it was."""
        before = self._seen or session
        self._seen = msgspec.structs.replace(
            session,
            runtime_id=session.runtime_id or before.runtime_id,
            url=session.url or before.url,
            api_key=session.api_key or before.api_key,
        )
        return self._seen

    async def _persistently(self, work: Callable[[], Awaitable[Session | None]]) -> Session:
        """Do it again, with growing pauses, as long as it may come to something."""
        began = asyncio.get_running_loop().time()

        def may_come(error: BaseException) -> bool:
            waited = asyncio.get_running_loop().time() - began
            return may_pass(error) and (self._api.has_answered or waited < self._options.connect_timeout)

        session: Session = await _again(
            work, may_come, lambda session: session is None, before_sleep=self._complain
        )
        self._problem = None
        return self._note(session)

    def _complain(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, RemoteApiError):
            self._problem = error
            logger.info("%s (trying again)", error)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[float]:
        """Yields the time of the loop at which it is over."""
        self._problem = None
        try:
            async with asyncio.timeout(self._options.startup_timeout) as limit:
                yield limit.when() or 0.0
        except TimeoutError as exc:
            if not limit.expired() or isinstance(exc, AgentServerError):
                raise
            said = f"; {self._problem}" if self._problem is not None else _state(self._seen)
            details = self._problem.details if self._problem is not None else {"phase": "ready"}
            raise RemoteApiError(
                f"the runtime of session {self.session_id} was not ready after "
                f"{self._options.startup_timeout:g} s{said}",
                **details,
            ) from None

    def _tell(self, phase: str, done: int) -> None:
        if self._options.on_progress is not None:
            try:
                self._options.on_progress(phase, done, 1)
            except Exception:  # it is the user's; its error must not end the start
                logger.exception("on_progress failed")

    # --- when there is no connection ---

    async def _connection_changed(self, reason: AgentServerError | None) -> None:
        self._end_inquiry()
        if reason is not None:
            self._inquiry = asyncio.create_task(self._inquire())
        if self._options.on_connection is not None:
            told = self._options.on_connection(reason)
            if told is not None:
                await told

    async def _inquire(self) -> None:
        """Find out whether the runtime comes back; if not, everything that waits for it gets to know why."""
        try:
            await _again(self._look, may_pass, lambda _: True)
        except AgentServerError as exc:
            if not self._gone.done():
                self._gone.set_result(exc)

    def _end_inquiry(self) -> None:
        if self._inquiry is not None:
            self._inquiry.cancel()
            self._inquiry = None

    # --- its end ---

    async def _end(self) -> None:
        """Stop or pause the runtime, if that is to be done. A cancel waits for that."""
        if self._undo is not None:
            await to_its_end(self._verb_or_warning(self._undo))

    async def _verb_or_warning(self, verb: str) -> None:
        from tenacity import stop_after_attempt  # noqa: PLC0415

        try:
            async with asyncio.timeout(END_SECONDS):
                await _again(lambda: self._verb_once(verb), may_pass, stop=stop_after_attempt(END_TRIES))
        except (AgentServerError, TimeoutError) as exc:
            reason = str(exc) or f"no answer within {END_SECONDS:g} s"
            logger.warning("the runtime of session %s may still be there: %s", self.session_id, reason)

    async def _verb_once(self, verb: str) -> None:
        seen = self._seen or await self._api.session(self.session_id)
        if seen is None:
            return
        try:
            await self._api.verb(verb, seen.runtime_id, timeout=END_SECONDS)
        except RemoteApiError as exc:
            if exc.details.get("status") != 404:  # gone already
                raise


async def _again(
    work: Callable[[], Awaitable[Any]],
    may_pass: Callable[[BaseException], bool],
    is_missing: Callable[[Any], bool] = lambda _: False,
    **how: Any,
) -> Any:
    """Do it again, with growing pauses, while its error may pass or its result is missing."""
    from tenacity import AsyncRetrying, retry_if_exception, retry_if_result  # noqa: PLC0415  costs 70 ms
    from tenacity import wait_random_exponential as wait  # noqa: PLC0415

    pause = wait(multiplier=FIRST_SECONDS, max=LONGEST_SECONDS)
    retrying = AsyncRetrying(
        wait=lambda state: _retry_after(state) + pause(state),
        retry=retry_if_exception(may_pass) | retry_if_result(is_missing),
        reraise=True,
        **how,
    )

    async def once() -> Any:
        return await work()

    return await retrying(once)


def _state(session: Session | None) -> str:
    """What is known of a session, as the end of a sentence."""
    if session is None:
        return ""
    state = f" (it is {session.pod_status or session.status or 'in no state that is told'})"
    return f"{state}; it said: {session.problem}" if session.problem else state


def _retry_after(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after_ms or 0) / 1000 if isinstance(error, RemoteApiError) else 0.0
