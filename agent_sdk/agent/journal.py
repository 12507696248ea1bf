"""What a turn needs of the log it writes; the conversation provides it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from agent_sdk.agent.history import History
from agent_sdk.agent.turn_state import TurnState
from agent_sdk.protocol.events import Event


class Journal(Protocol):
    """The log of one conversation, and what follows from it."""

    history: History

    @property
    def turn(self) -> TurnState:
        """What the log says of turns."""
        ...

    def submit(self, *events: Event, op: Any = None) -> Awaitable[Any]:
        """Queue events for the log now; the result comes with the commit. Must not be cancelled."""
        ...

    async def append(self, *events: Event, op: Any = None) -> None:
        """Queue events now and wait for the commit; cancelling ends the waiting only.

        Args:
            events: one commit's.
            op: the operation they belong to, which is remembered in the same commit.
        """
        ...

    async def mend(self) -> None:
        """Close a turn that nobody runs any more, if there is one."""
        ...

    async def settle(self) -> None:
        """Return when nothing is queued any more; without giving way when nothing is."""
        ...

    def delta(self, run_id: str, text: str, thinking: str) -> None:
        """Pass on a transient piece of an answer."""
        ...
