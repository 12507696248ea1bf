"""What follows from a log: state, stats, title, pending requests. Grown event by event, never computed anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec.structs import replace

from agent_sdk.agent.progress import Progress
from agent_sdk.conversation.contract import Outcome, Waits, outcome_of
from agent_sdk.protocol.errors import RequestNotFound
from agent_sdk.protocol.events import (
    AgentConfigured,
    ConversationCreated,
    Event,
    Interrupted,
    ModelUsed,
    PauseRequested,
    RequestOpened,
    RequestResolved,
    SecretsChanged,
    TitleChanged,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    TurnStarted,
    UserMessage,
)
from agent_sdk.protocol.results import PendingRequest, Snapshot, State, Stats, Wait

KNOWN_NOW = ("key", "box")
"""What is waited for of these is known without the log, and sooner."""


class Fold:
    """Feed it every event in the order of the log."""

    def __init__(self) -> None:
        self.created = False
        self.title: str | None = None
        self.tags: dict[str, str] = {}
        self.stats = Stats()
        self.configured: AgentConfigured | None = None
        self.secret_names: frozenset[str] = frozenset()
        self.run_id: str | None = None
        """Of the running or last turn."""
        self.progress: Progress | None = None
        """Of the turn whose TurnStarted was written and whose TurnEnded was not."""
        self.pause_requested = False
        self.outcome: Outcome | None = None
        self.ended_seq = 0
        self.pending: dict[str, RequestOpened] = {}
        self.answers: dict[str, str] = {}
        """How requests were resolved: `approved`, `rejected`, `void`, …"""
        self.waits = Waits()
        self.results: dict[str, dict[str, Any]] = {}
        """The `data` of each tool's last result that was no error."""
        self._created_at = 0.0
        self._updated_at = 0.0
        self._asked_to_stop = False
        self._seq = 0
        self.stopped = False
        """Somebody interrupted the last turn, and nobody has said anything since: it is to stay so."""

    def __repr__(self) -> str:
        return f"<Fold at seq {self._seq}, turn {'open' if self.turn_open else 'closed'}>"

    @property
    def turn_open(self) -> bool:
        """Whether TurnStarted was written and TurnEnded was not."""
        return self.progress is not None

    @property
    def resumable(self) -> bool:
        """Whether the last turn ended before it was done, and not because somebody wanted it to end."""
        if self.outcome is None or self.turn_open or self.outcome.status == "finished":
            return False
        return self.outcome.status != "interrupted" or not self._asked_to_stop

    @property
    def failed_run_id(self) -> str | None:
        """Of the last turn, if it has failed or come to its limit."""
        if self.outcome is None or self.turn_open or self.outcome.status not in ("failed", "limit"):
            return None
        return self.outcome.run_id

    @property
    def paused(self) -> bool:
        """Whether the last turn was paused, and none runs."""
        return self.outcome is not None and self.outcome.status == "paused" and not self.turn_open

    def answered(self, request_id: str, answer: Literal["approve", "reject"]) -> bool:
        """Return whether a request got this answer before.

        Raises:
            RequestNotFound: it was resolved otherwise.
        """
        before = self.answers.get(request_id)
        if before is not None and before != f"{answer.rstrip('e')}ed":
            raise RequestNotFound(
                f"request_id: {request_id} is {before} already, and the first answer counts",
                request=request_id,
            )
        return before is not None

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
            case UserMessage():
                self.stopped = False
            case TitleChanged():
                self.title, self.tags = event.title, event.tags
            case SecretsChanged():
                self.secret_names |= set(event.names)
            case RequestOpened():
                self.pending[event.request_id] = event
            case RequestResolved():
                self.pending.pop(event.request_id, None)
                self.answers[event.request_id] = event.answer
            case PauseRequested():
                self.pause_requested = True
            case ToolCalled():
                self.stats = replace(self.stats, tool_calls=self.stats.tool_calls + 1)
            case ToolReturned(is_error=False):
                self.results[event.tool] = event.data
            case ModelUsed():
                self._count(event)
            case TurnStarted() | Interrupted() | TurnEnded():
                self._turn(event)
            case _:
                pass
        self.waits.add(event)
        if self.progress is not None:
            self.progress.add(event)

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
                for request in self.pending.values()
            ),
            run_id=self.run_id,
            model=configured.model if configured else None,
            waiting_for="; ".join(wait.reason for wait in waits),
            waits=waits,
        )

    def _state(self, working: bool, closed: bool, waits: bool) -> State:
        if closed:
            return "closed"
        if working:
            return "awaiting" if waits else "running"
        if self.outcome is not None and self.outcome.status == "failed":
            return "failed"
        return "paused" if self.resumable or self.turn_open else "idle"

    def _turn(self, event: TurnStarted | Interrupted | TurnEnded) -> None:
        if isinstance(event, Interrupted):
            self._asked_to_stop = self.stopped = True
            return
        self.run_id = event.run_id
        self.pause_requested = False
        if isinstance(event, TurnStarted):
            self._asked_to_stop = self.stopped = False
            self.progress = Progress(event.run_id)
            self.stats = replace(self.stats, turns=self.stats.turns + 1)
        else:
            self.progress, self.outcome, self.ended_seq = None, outcome_of(event), event.seq

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
