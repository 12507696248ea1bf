"""A client's way to its server: a connection that is made again, by itself, whenever it is lost.

One task keeps it. Between two tries it waits, longer each time up to 10 s, by chance, so that many
clients that lost the same server do not come back together; a server that says when it wants to be
asked again is obeyed. A connection that was made and lost again before anything came of it that the next one
need not bring again is one more try. Only what cannot become better by trying again ends it: see `final_error`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from ssl import SSLContext
from typing import TYPE_CHECKING, Protocol, Self

import msgspec
from msgspec import Raw, Struct

from agent_sdk.cancellation import cancel_and_wait, tell
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    InternalError,
    LimitExceeded,
    PolicyDenied,
    Unauthorized,
)
from agent_sdk.protocol.methods.connection import Draining
from agent_sdk.protocol.results import Snapshot
from agent_sdk.protocol.specs import WorkspaceSpec
from agent_sdk.remote.connection import HEARTBEAT_SECONDS, Connection, connect
from agent_sdk.remote.link import Link, Linked

if TYPE_CHECKING:
    from tenacity import RetryCallState

logger = logging.getLogger("agent_sdk")

FIRST_SECONDS = 0.1
LONGEST_SECONDS = 10.0
STEADY_SECONDS = 10.0
"""A connection that lasted so long worked, although nothing was said."""
SOON_SECONDS = 0.25
"""The longest pause after a server has said that it ends: the next one is usually there in a moment."""
UNASKED_SECONDS = 1.0
"""Before a server that closed the connection on purpose is asked again, when it named no time."""

OnConnection = Callable[[AgentServerError | None], Awaitable[None] | None]
"""Called with the reason when a connection is lost or cannot be made, and with None when there is one again."""

_FINAL: Mapping[int, Callable[[str], AgentServerError]] = {
    4401: lambda why: Unauthorized(f"the server does not accept the API key any more: {why}"),
    4403: lambda why: PolicyDenied(f"the server does not allow it any more: {why}"),
    4404: lambda why: ConversationNotFound(f"the conversation is gone: {why}"),
    4413: lambda why: LimitExceeded(f"a message was too long for the connection: {why}"),
    1009: lambda why: LimitExceeded(f"a message was too long for the connection: {why}"),
}
_BROKEN_RULES = frozenset({4400, 1002, 1003, 1007, 1008})
_GOING_AWAY = frozenset({1001, 1012, 4503})
"""The server ends, and says so."""
_UNINTENDED = frozenset({1000, 1001, 1005, 1006})
"""The connection ended; nobody meant it."""


class Target(Struct, frozen=True, kw_only=True):
    """What a client wants to be connected to, and how long it tries."""

    url: str
    api_key: str | None = None
    ssl: SSLContext | None = None
    direct: bool = False
    """Whether no proxy of the environment leads there: it is a server that this process started itself."""
    conversation: str
    workspace: WorkspaceSpec | None = None
    """For a conversation that has to be made, under the id given; None: there is one."""
    connect_timeout: float | None = 5.0
    """Seconds in which the first connection is tried again; None: for ever."""
    reconnect_timeout: float | None = None
    """The same for every later one."""
    heartbeat: float = HEARTBEAT_SECONDS
    on_connection: OnConnection | None = None
    gone: asyncio.Future[AgentServerError] | None = None
    """Done when somebody knows that the server will not come back, with the reason."""


class LinkUser(Protocol):
    """What uses a link and is told of each connection: the conversation."""

    async def connected(self, connection: Connection) -> None:
        """Take up a new connection, before anybody else uses it."""
        ...

    def noticed(self, method: str, params: Raw) -> None:
        """Take a notice of the server."""
        ...

    def unreachable(self, error: AgentServerError) -> None:
        """The connection is lost, or cannot be made; it is being tried."""
        ...

    def ended(self, error: AgentServerError) -> None:
        """Note that there will be no further connection, and why."""
        ...


class ServerLink(Link):
    """A client's Link to its server. Entering makes the first connection, leaving closes the last."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._is_made = target.workspace is None
        self._user: LinkUser | None = None
        self._attaching = asyncio.Lock()
        self._user_knows: Connection | None = None
        self._connection: Connection | None = None
        self._error: AgentServerError | None = None
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._patience = target.connect_timeout
        self._trying_since = 0.0
        """When what worked was lost: from then on the patience counts."""
        self._pause = 0.0
        self._goes_away = False
        """The connection that was lost last had been told that its server ends."""
        self._hurry = asyncio.Event()
        self._complained = False
        self._reached = False
        self.was_attached = False
        """Whether a user is attached, or was."""

    def __repr__(self) -> str:
        state = "lost" if self._error else "connected" if self._connection else "connecting"
        return f"<ServerLink to {self._target.url}, {state}>"

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep())
        if self._target.gone is not None:
            self._target.gone.add_done_callback(self._given_up)
        try:
            await self.linked()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; there will be no other."""
        self._user = None
        self._end(ConnectionLost("the connection was closed here"))
        await self._stop()

    @property
    def conversation(self) -> str:
        """Id of the conversation it is bound to."""
        return self._target.conversation

    async def bound_to(self) -> Snapshot | None:
        """Return what the conversation was when the present connection was made; raises as `linked` does."""
        return (await self._connected()).answer.state

    async def linked(self) -> Linked:
        """Return the connection, waiting while it is being made or found again. Cancelling ends the waiting only.

        Raises:
            Unauthorized, ConversationNotFound, PolicyDenied, InvalidParams, …: trying again is no use.
            ConnectionLost, Overloaded, …: it was tried for as long as the target allows.
        """
        connection = await self._connected()
        is_box = connection.answer.conversation is None
        return Linked(connection.peer, connection.answer.connection_id if is_box else "")

    async def attach(self, user: LinkUser) -> None:
        """Have it told of all connections; it knows the present one when this returns.

        Raises:
            AgentServerError: what `linked` or its `connected` raises; then it is not attached.
        """
        self._user, self.was_attached = user, True
        try:
            while True:
                connection = await self._connected()
                try:
                    return await self._tell_user(connection)
                except ConnectionLost:
                    if connection.peer.lost is None:
                        raise
        except BaseException:
            self._user = None
            raise

    def detach(self, user: LinkUser) -> None:
        """Tell it no more, if it is the one that is attached."""
        if self._user is user:
            self._user = None

    def retry_now(self) -> None:
        """Try again now and not after a pause; for whoever knows that the server is back."""
        self._hurry.set()

    async def _connected(self) -> Connection:
        while self._connection is None or self._connection.peer.lost is not None:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        return self._connection

    # --- the keeper ---

    async def _keep(self) -> None:
        from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential  # noqa: PLC0415  costs 70 ms

        clock = asyncio.get_running_loop().time

        def wait(state: RetryCallState) -> float:
            longest = LONGEST_SECONDS if self._patience is None else min(LONGEST_SECONDS, self._patience / 4)
            if self._goes_away:
                longest = min(longest, max(SOON_SECONDS, (clock() - self._trying_since) / 10))
            chance = wait_random_exponential(multiplier=FIRST_SECONDS, max=longest)
            return (_failure(state).retry_after_ms or 0) / 1000 + chance(state)

        def is_over(state: RetryCallState) -> bool:
            waited = clock() - self._trying_since + state.upcoming_sleep
            return self._patience is not None and waited >= self._patience

        async def complain(state: RetryCallState) -> None:
            await self._complain(_failure(state))

        retrying = AsyncRetrying(
            wait=wait,
            stop=is_over,
            retry=retry_if_exception(self._may_pass),
            before_sleep=complain,
            sleep=self._rest,
            reraise=True,
        )
        self._trying_since = clock()
        try:
            while True:
                await retrying(self._live)
        except AgentServerError as exc:
            self._end(final_error(exc) or exc)
        except Exception as exc:
            logger.exception("the connection to %s cannot be kept", self._target.url)
            self._end(InternalError(f"the connection cannot be kept: {exc!r}"))

    async def _live(self) -> None:
        """Make a connection and use it until it is lost.

        Raises:
            AgentServerError: there was none, or it was lost before anything came of it.
        """
        clock = asyncio.get_running_loop().time
        async with AsyncExitStack() as stack:
            connection = await self._try(stack)
            first, self._patience = not self._reached, self._target.reconnect_timeout
            self._reached = True
            begun = clock()
            await self._found(connection)
            lost = await self._until_lost()
        worked = connection.peer.progress > 0 or clock() - begun >= STEADY_SECONDS
        if first or worked:
            self._trying_since = clock()
        await self._rest(self._pause_after(lost))
        if not worked:
            raise ConnectionLost(
                f"{self._target.url} takes connections and drops them before anything comes of them: {lost}",
                **lost.details,
            )

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        self._hurry.clear()

    async def _try(self, stack: AsyncExitStack) -> Connection:
        target = self._target
        async with AsyncExitStack() as attempt:
            connection = await attempt.enter_async_context(
                connect(
                    target.url,
                    target.api_key,
                    ssl=target.ssl,
                    direct=target.direct,
                    conversation=target.conversation if self._is_made else "new",
                    workspace=target.workspace,
                    new_id=target.conversation,
                    on_notice=self._noticed,
                    heartbeat=target.heartbeat,
                )
            )
            self._is_made = True
            await self._tell_user(connection)
            stack.push_async_exit(attempt.pop_all())
        return connection

    async def _tell_user(self, connection: Connection) -> None:
        async with self._attaching:
            if self._user is not None and self._user_knows is not connection:
                await self._user.connected(connection)
                self._user_knows = connection

    async def _until_lost(self) -> ConnectionLost:
        assert self._connection is not None
        lost = await self._connection.peer.wait_closed()
        self._connection = self._user_knows = None
        final = final_error(lost)
        if final is not None:
            raise final
        await self._complain(lost)
        return lost

    def _may_pass(self, error: BaseException) -> bool:
        """Whether a failed try is worth another one."""
        if self._target.url.startswith("unix:"):
            return False  # nobody starts that box again
        if self._reached and isinstance(error, ConnectionLost) and _is_misled(error):
            return True  # the server was there: what answers in its place now is on its way to be mended
        return isinstance(error, AgentServerError) and final_error(error) is None

    def _pause_after(self, lost: ConnectionLost) -> float:
        pause, self._pause = self._pause, 0.0
        code = lost.details.get("close_code")
        self._goes_away = pause > 0 or code in _GOING_AWAY
        return max(pause, 0.0 if code in _UNINTENDED | _GOING_AWAY else UNASKED_SECONDS)

    def _noticed(self, method: str, params: Raw) -> None:
        if method == Draining.method:
            with suppress(msgspec.DecodeError):
                after = msgspec.json.decode(params, type=Draining).retry_after_ms
                self._pause = min(max(after, 0), 60_000) / 1000
        elif self._user is not None:
            self._user.noticed(method, params)

    # --- who wants to know ---

    async def _found(self, connection: Connection) -> None:
        self._connection = connection
        self._wake()
        if self._complained:
            await self._tell(None)

    async def _complain(self, error: AgentServerError) -> None:
        if not self._complained:
            await self._tell(error)

    async def _tell(self, error: AgentServerError | None) -> None:
        self._complained = error is not None
        if error is not None and self._user is not None:
            self._user.unreachable(error)
        if self._target.on_connection is not None:
            await tell(self._target.on_connection, error)

    def _end(self, error: AgentServerError) -> None:
        if self._error is None:
            self._error = error
            if self._user is not None:
                self._user.ended(error)
        self._wake()

    def _given_up(self, gone: asyncio.Future[AgentServerError]) -> None:
        if not gone.cancelled() and self._keeper is not None:
            self._end(gone.result())
            self._keeper.cancel()

    def _wake(self) -> None:
        # Whoever waits has the old event object; the next wait gets a fresh one.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _stop(self) -> None:
        if self._target.gone is not None:
            self._target.gone.remove_done_callback(self._given_up)
        await cancel_and_wait(self._keeper)


def final_error(error: AgentServerError) -> AgentServerError | None:
    """Return what to tell the user when trying again is no use after this; None: it is."""
    if not error.retryable:
        return error
    if not isinstance(error, ConnectionLost):
        return None
    code = int(error.details.get("close_code", 0))
    if code in _FINAL:
        return _FINAL[code](str(error.details.get("reason") or error))
    return error if code in _BROKEN_RULES or _is_misled(error) else None


def _is_misled(error: ConnectionLost) -> bool:
    """Whether somebody else than a server is at the address, or none that is to be trusted."""
    return "status" in error.details or "tls" in error.details


def _failure(state: RetryCallState) -> AgentServerError:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, AgentServerError)
    return failure
