"""What follows from a log: state, stats, title, agent. Grown event by event, never computed anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from agent_sdk.agent.turn_state import Phase, TurnState
from agent_sdk.conversation.contract import Waits
from agent_sdk.protocol.events import (
    AgentConfigured,
    ConversationCreated,
    Event,
    ModelUsed,
    SecretsChanged,
    TitleChanged,
    ToolCalled,
    ToolReturned,
    TurnStarted,
)
from agent_sdk.protocol.results import PendingRequest, Snapshot, State, Stats, Wait

KNOWN_NOW = ("key", "box")
"""What is waited for of these is known without the log, and sooner."""


class ConversationState:
    """What the log says of the conversation. Feed it every event in the order of the log."""

    def __init__(self) -> None:
        self.turn = TurnState()
        """What it says of turns."""
        self.created = False
        self.title: str | None = None
        self.tags: dict[str, str] = {}
        self.stats = Stats()
        self.configured: AgentConfigured | None = None
        self.secret_names: frozenset[str] = frozenset()
        self.waits = Waits()
        self.results: dict[str, dict[str, Any]] = {}
        """The `data` of each tool's last result that was no error."""
        self._created_at = 0.0
        self._updated_at = 0.0
        self._seq = 0

    def __repr__(self) -> str:
        return f"<ConversationState at seq {self._seq}, {self.turn!r}>"

    def retitled(self, title: str | None, tags: Mapping[str, str] | None) -> list[Event]:
        """Return what says a new title and new tags, if they are new; None: it stays."""
        kept = self.title if title is None else title
        merged = {**self.tags, **(tags or {})}
        return [] if (kept, merged) == (self.title, self.tags) else [TitleChanged(title=kept, tags=merged)]

    def add(self, event: Event) -> None:
        """Take in the next event of the log."""
        self._seq, self._updated_at = event.seq, event.at
        match event:
            case ConversationCreated():
                self.created, self._created_at = True, event.at
            case AgentConfigured():
                self.configured = event
            case TitleChanged():
                self.title, self.tags = event.title, event.tags
            case SecretsChanged():
                self.secret_names |= set(event.names)
            case ToolCalled():
                self.stats = replace(self.stats, tool_calls=self.stats.tool_calls + 1)
            case ToolReturned(is_error=False):
                self.results[event.tool] = event.data
            case ModelUsed():
                self._count(event)
            case TurnStarted():
                self.stats = replace(self.stats, turns=self.stats.turns + 1)
            case _:
                pass
        self.waits.add(event)
        self.turn.add(event)

    def snapshot(
        self, id: str, epoch: str, *, working: bool, closed: bool, waits: tuple[Wait, ...]
    ) -> Snapshot:
        """Return the state; `working`: a turn runs in this process or is about to; `waits`: beside those of the log."""
        configured = self.configured
        waits = (*waits, *(wait for wait in self.waits if wait.what not in KNOWN_NOW))
        return Snapshot(
            id=id,
            state=self._state(working, closed, bool(waits)),
            epoch=epoch,
            head_seq=self._seq,
            title=self.title,
            tags=self.tags,
            created_at=self._created_at,
            updated_at=self._updated_at,
            stats=self.stats,
            pending=tuple(
                PendingRequest(
                    request_id=request.request_id,
                    request=request.request,
                    tool=request.tool,
                    arguments=request.arguments,
                )
                for request in self.turn.pending
            ),
            run_id=self.turn.run_id,
            model=configured.model if configured else None,
            waiting_for="; ".join(wait.reason for wait in waits),
            waits=waits,
        )

    def _state(self, working: bool, closed: bool, waits: bool) -> State:
        if closed:
            return "closed"
        if working:
            return "awaiting" if waits else "running"
        if self.turn.phase is Phase.FAILED:
            return "failed"
        return "paused" if self.turn.resumable or self.turn.is_open else "idle"

    def _count(self, used: ModelUsed) -> None:
        stats = self.stats
        cost = stats.cost if used.cost is None else (stats.cost or 0.0) + max(used.cost, 0.0)
        self.stats = replace(
            stats,
            model_calls=stats.model_calls + 1,
            input_tokens=stats.input_tokens + max(used.input_tokens, 0),
            output_tokens=stats.output_tokens + max(used.output_tokens, 0),
            cached_tokens=stats.cached_tokens + max(used.cached_tokens, 0),
            cost=cost,
        )
