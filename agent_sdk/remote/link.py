"""A way to a Peer that may be lost and found again, calls that survive that, and verbs of the contract as such calls.

A client's link is one that reconnects to its server; a server's link leads to a box, which is started
at its first use and found again after a restart. Both are used in the same way: `persistent` runs a
piece of work with a Peer, and runs it again with the next one when the connection was lost
meanwhile. That is safe, because every call that changes something carries an op_id. Verbs are made by construction
from the verb of the contract and the method that is named after it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import cache, wraps
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from agent_sdk.protocol.errors import (
    DRAINING,
    AgentServerError,
    ConnectionLost,
    InvalidParams,
    OutcomeUnknown,
    Overloaded,
    TimedOut,
)
from agent_sdk.protocol.methods.method import Done, Effect, Method
from agent_sdk.rpc.peer import Peer
from agent_sdk.version import __version__
from agent_sdk.workspace.verbs import KEYS, call_of, method_of, verbs

T = TypeVar("T")
Verb = TypeVar("Verb", bound=Callable[..., Any])


class Linked(NamedTuple):
    """A connection that is up."""

    peer: Peer
    instance: str
    """Of the other end: another instance does not know what the one before it was asked to do."""


class Link(Protocol):
    """A way to a Peer that may be lost and found again."""

    async def linked(self) -> Linked:
        """Return the connection, waiting while it is being made or found again. Cancelling ends the waiting only.

        Raises:
            ConnectionLost, WorkspaceUnavailable, Unauthorized, …: there is none, and there will be none.
        """
        ...


class Fixed(Link):
    """The link over a Peer that belongs to somebody else; when it is lost, it is lost."""

    def __init__(self, peer: Peer) -> None:
        self._linked = Linked(peer, "")

    async def linked(self) -> Linked:
        if self._linked.peer.lost is not None:
            raise self._linked.peer.lost
        return self._linked


class Until(Link):
    """A link whose connection is waited for until a point in time; one that is up may be used after it."""

    def __init__(self, link: Link, seconds: float | None) -> None:
        """Take the link, and how long from now; None: for ever."""
        self._link = link
        self._deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least a millisecond; None: there is no end."""
        if self._deadline is None:
            return None
        return max(self._deadline - asyncio.get_running_loop().time(), 0.001)

    async def linked(self) -> Linked:
        """Return the connection, waiting no longer than until that time.

        Raises:
            TimedOut: there was none in time.
        """
        try:
            async with asyncio.timeout_at(self._deadline) as limit:
                return await self._link.linked()
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimedOut("there was no connection in time") from None


async def persistent(
    link: Link, work: Callable[[Peer], Awaitable[T]], *, changes_something: bool = True
) -> T:
    """Run `work` with the link's Peer, and again with the next one as often as the connection is lost under it.

    Cancelling while there is no connection ends the waiting at once; what was asked for goes on at the
    other end, because nobody can tell it.

    Args:
        changes_something: without that, another instance of the other end may do it as well.

    Raises:
        OutcomeUnknown: the other end was lost, not the connection alone: whether the work was done is not known.
        ConnectionLost, WorkspaceUnavailable, …: what `linked` raises; and what `work` raises.
    """
    first = linked = await link.linked()
    while True:
        try:
            result = await work(linked.peer)
            linked.peer.progress += 1
            return result
        except AgentServerError as exc:
            await passed(linked.peer, exc)
        linked = await link.linked()
        if changes_something and linked.instance != first.instance:
            raise OutcomeUnknown("the place where it ran was lost; whether it was done is not known")


async def passed(peer: Peer, error: AgentServerError) -> None:
    """Return when what failed so over this connection is to be tried over the next one; else raise the error."""
    if isinstance(error, ConnectionLost) and peer.lost is not None:
        return  # else the other end says it, of a connection of its own
    if isinstance(error, InvalidParams) and "unknown field" in error.message:
        older = f"the other end is older than this client (agent-sdk {__version__}) and does not know it yet; update it"
        raise InvalidParams(f"{error.message}: {older}", **error.details)
    if not (isinstance(error, Overloaded) and error.details.get("reason") == DRAINING):
        raise error
    await peer.wait_closed()  # it was refused; the next server will not


async def ask(link: Link, call: Method[T]) -> T:
    """Call a method of the other end, over as many connections as it takes."""
    return await persistent(link, lambda peer: peer.call(call), changes_something=isinstance(call, Effect))


async def ask_page(link: Link, call: Callable[[int], Method[T]], most: int) -> T:
    """Ask for so many entries at most: for half as many whenever no connection lived long enough for them.

    Args:
        call: makes the call for a number of entries.
        most: how many are asked for at first.
    """
    size = most

    async def ask_for_fewer(peer: Peer) -> T:
        nonlocal size
        asked, size = size, max(1, size // 2)
        return await peer.call(call(asked))

    return await persistent(link, ask_for_fewer, changes_something=False)


class Part:
    """A part of a workspace there. What its contract has and its class does not write is asked of the other end."""

    def __init__(self, link: Link, key: str = "") -> None:
        """Take the way to it, and which one it is, where a workspace has several."""
        self._link = link
        self._key = key

    @classmethod
    def of(cls, link: Link, key: str = "") -> Self:
        """Return one: to type checkers, which do not see the verbs that are made here, its class is abstract."""
        return cls(link, key)

    def __init_subclass__(cls, *, part: str) -> None:
        for name, verb in verbs(part).items():
            if name not in vars(cls):
                method = method_of(part, name)
                if method is None:
                    raise TypeError(
                        f"{cls.__name__}.{name} is not written, and no method {part}.{name} says it without bytes"
                    )
                setattr(cls, name, asking(verb, method, KEYS.get(part)))
        super().__init_subclass__()

    async def _ask(self, call: Method[T]) -> T:
        return await ask(self._link, call)


def asking(verb: Verb, method: type[Method[Any]], key: str | None = None) -> Verb:
    """Return the verb as a call of this method: the same name, arguments and docstring.

    `key` is the param for the `_key` of the object whose verb it is.
    """

    @wraps(verb)
    async def asked(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = _signature(verb).bind(self, *args, **kwargs)
        given.apply_defaults()
        _, *arguments = given.arguments.items()
        named = {} if key is None else {key: self._key}
        answer = await self._ask(call_of(method, {**named, **dict(arguments)}))
        return None if isinstance(answer, Done) else answer

    return asked  # type: ignore[return-value]


@cache
def _signature(verb: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(verb)
