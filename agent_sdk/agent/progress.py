"""How far the open turn has come: what another process needs to go on with it when the one that runs it dies."""

from __future__ import annotations

from agent_sdk.agent.tools.registry import FINISH
from agent_sdk.protocol.events import (
    AgentMessage,
    Event,
    RequestOpened,
    RequestResolved,
    ToolReturned,
    TurnResumed,
)

SOON_SECONDS = 600.0
"""A process that takes a turn over this soon after the one before it counts as one more that the turn has ended."""


class Progress:
    """Feed it every event of one turn in the order of the log."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.generation = 1
        """How many processes have run the turn."""
        self.in_vain = 0
        """How many of them in a row, one soon after the other, brought it no further and waited for nobody."""
        self.iterations = 0
        self.calls = 0
        """How many the model's last answer has."""
        self.requests: dict[str, RequestOpened] = {}
        """Of the last answer's calls, by call id, answered or not."""
        self.answers: dict[str, RequestResolved] = {}
        """By request id."""
        self.concluded: str | None = None
        """What the last answer's `finish` said."""
        self._resumed_at = 0.0

    def __repr__(self) -> str:
        return f"<Progress of {self.run_id}: {self.iterations} steps, generation {self.generation}>"

    @property
    def waits(self) -> bool:
        """Whether somebody has to answer a request first."""
        return any(request.request_id not in self.answers for request in self.requests.values())

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case TurnResumed():
                soon = 0 <= event.at - self._resumed_at < SOON_SECONDS
                self.in_vain = 0 if self.waits else self.in_vain + 1 if soon else 1
                self.generation, self._resumed_at = event.generation, event.at
            case AgentMessage():
                self.iterations += 1
                self.calls = event.tool_calls
                self.requests, self.answers, self.concluded, self.in_vain = {}, {}, None, 0
            case RequestOpened():
                self.requests[event.call_id] = event
            case RequestResolved():
                self.answers[event.request_id] = event
                self.in_vain = 0
            case ToolReturned():
                self.in_vain = 0
                if event.tool == FINISH and not event.is_error:
                    self.concluded = event.text
            case _:
                pass
