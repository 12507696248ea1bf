"""A way to a Peer that may be lost and found again, and calls that survive that.

A client's link is one that reconnects to its server; a server's link leads to a box, which is started
at its first use and found again after a restart. Both are used in the same way: `persistent` runs a
piece of work with a Peer, and runs it again with the next one when the connection was lost
meanwhile. That is safe, because every call that changes something carries an op_id.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol, TypeVar

from agent_sdk.protocol.errors import ConnectionLost, OutcomeUnknown
from agent_sdk.rpc.peer import Peer

T = TypeVar("T")


class Linked(NamedTuple):
    """A connection that is up."""

    peer: Peer
    instance: str
    """Of the other end: another instance does not know what the one before it was asked to do."""


class Link(Protocol):
    """See the module's docstring."""

    async def linked(self) -> Linked:
        """Return the connection, waiting while it is being made or found again. Cancelling ends the waiting only.

        Raises:
            ConnectionLost, WorkspaceUnavailable, Unauthorized, …: there is none, and there will be none.
        """
        ...


class Fixed:
    """The link over a Peer that belongs to somebody else; when it is lost, it is lost."""

    def __init__(self, peer: Peer) -> None:
        self._linked = Linked(peer, "")

    async def linked(self) -> Linked:
        """See Link."""
        if self._linked.peer.lost is not None:
            raise self._linked.peer.lost
        return self._linked


async def persistent(link: Link, work: Callable[[Peer], Awaitable[T]]) -> T:
    """Run `work` with the link's Peer, and again with the next one as often as the connection is lost under it.

    Raises:
        OutcomeUnknown: the other end was lost, not the connection alone: whether the work was done is not known.
        ConnectionLost, WorkspaceUnavailable, …: what `linked` raises; and what `work` raises.
    """
    first = linked = await link.linked()
    while True:
        try:
            return await work(linked.peer)
        except ConnectionLost:
            if linked.peer.lost is None:
                raise  # the other end says it, of a connection of its own
        linked = await link.linked()
        if linked.instance != first.instance:
            raise OutcomeUnknown("the place where it ran was lost; whether it was done is not known")
