"""The contract of a Conversation: an append-only log of events and the verbs that extend it.

Implementations: `agent_sdk.conversation.local` here, `agent_sdk.remote.conversation` there.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Literal, Protocol, Self

from msgspec import Struct

from agent_sdk.protocol.checks import (
    Checked,
    Comment,
    Name,
    OpId,
    Patience,
    Reason,
    Secrets,
    Seq,
    Tags,
    Title,
    Verbs,
)
from agent_sdk.protocol.errors import TimedOut, TurnWaits
from agent_sdk.protocol.events import (
    Delta,
    Event,
    RequestOpened,
    RequestResolved,
    RunStatus,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    Waiting,
)
from agent_sdk.protocol.results import Accepted, PendingRequest, Snapshot, State, Stats, Wait
from agent_sdk.protocol.specs import ConfirmationPolicy, Model

__all__ = [
    "Accepted",
    "Callback",
    "Conversation",
    "Cursor",
    "OnDelta",
    "OnReset",
    "OnWaiting",
    "Outcome",
    "PendingRequest",
    "Snapshot",
    "State",
    "Stats",
    "Wait",
    "outcome_of",
]

Callback = Callable[[Event], Awaitable[None] | None]
"""Called exactly once per event, in the order of `seq`. What it raises is logged and does not stop the delivery."""

OnDelta = Callable[[Delta], Awaitable[None] | None]


class Cursor(Checked, frozen=True):
    """A place in a log, right behind an event. Plain data: store it together with what a program made of the events."""

    epoch: str
    """Of the log; another epoch is another history."""
    seq: Seq
    """Of the last event that was seen; 0: none."""


OnReset = Callable[[Cursor], Awaitable[None] | None]
"""Called, in order with the events, when the history is gone (say, a log was restored from a backup): what was made of
the events so far is void. Those of another history follow, after the cursor that it is given."""


OnWaiting = Callable[[Wait], Awaitable[None] | None] | Literal["raise"]
"""Called when a turn that `run` waits for needs something, with what that is; what it raises, `run` raises. `"raise"`:
`run` raises TurnWaits instead. The turn itself is not touched by either."""


class Waits:
    """What a conversation waits for, as far as its events say it. Feed it every event in the order of the log."""

    def __init__(self) -> None:
        self._now: dict[str, Wait] = {}

    def __iter__(self) -> Iterator[Wait]:
        return iter(tuple(self._now.values()))

    def begin(self, waits: Iterable[Wait]) -> None:
        """Take what a server says of it."""
        self._now = {wait.request_id or wait.what: wait for wait in waits}

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case RequestOpened(request_id=id, request=what, tool=tool):
                wanted = (
                    f"an answer to request {id}: whether {tool} may run"
                    if what == "approval"
                    else f"a client that has the tool {tool} and runs it"
                )
                self._now[id] = Wait(what=what, reason=wanted, request_id=id, tool=tool)
            case RequestResolved(request_id=id):
                self._now.pop(id, None)
            case Waiting(what=what, reason=""):
                self._now.pop(what, None)
            case Waiting(what=what, reason=reason):
                self._now[what] = Wait(what=what, reason=reason)
            case TurnResumed():
                self._now = {key: wait for key, wait in self._now.items() if wait.request_id}
            case TurnStarted() | TurnEnded():
                self._now.clear()
            case _:
                pass


async def tell_waits(waits: Iterable[Wait], told: set[Wait], on_waiting: OnWaiting | None) -> None:
    """Tell who called `run` of what is waited for and not `told` yet.

    Raises:
        TurnWaits: the caller wants that; or wants nothing, and it is a key, which nobody else has to bring.
    """
    for wait in waits:
        if wait in told:
            continue
        told.add(wait)
        if on_waiting == "raise" or (on_waiting is None and wait.what == "key"):
            raise TurnWaits(f"the turn waits for {wait.reason}", what=wait.what, request_id=wait.request_id)
        if callable(on_waiting):
            telling = on_waiting(wait)
            if inspect.isawaitable(telling):
                await telling


def still_runs(seconds: float | None, waits: Iterable[Wait]) -> TimedOut:
    """Return what `run` raises when its time is over."""
    reasons = "; ".join(wait.reason for wait in waits)
    waiting = f" and waits for {reasons}" if reasons else ""
    return TimedOut(f"the turn still runs after {seconds} seconds{waiting}", seconds=seconds)


class Outcome(Struct, frozen=True, kw_only=True):
    """How a turn ended."""

    status: RunStatus
    reason: str = ""
    final_text: str = ""
    run_id: str = ""
    error: str | None = None
    finish_reason: str = ""
    """Of the model's last answer: `stop`, `length`, `refused`, `filtered`, …; see events.AgentMessage."""


def outcome_of(ended: TurnEnded) -> Outcome:
    """Return what `run` says of this end of a turn."""
    return Outcome(
        status=ended.status,
        reason=ended.reason,
        final_text=ended.final_text,
        run_id=ended.run_id,
        error=ended.error,
        finish_reason=ended.finish_reason,
    )


class Conversation(Verbs, Protocol):
    """A conversation: a log of events that its verbs extend. Opened at its first use; `async with` is optional."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    @property
    def id(self) -> str:
        """The id of the conversation; known after the first use."""
        ...

    @property
    def cursor(self) -> Cursor:
        """The place of the event that the callbacks were given last; within a callback, of that very event.

        Stored together with the callback's effect, and given as `since` to a later Conversation of the same id,
        it makes the effect happen exactly once even when this process dies.
        """
        ...

    async def send_message(
        self, text: str, *, mode: Literal["enqueue", "interrupt"] = "enqueue", op_id: OpId | None = None
    ) -> Accepted:
        """Append a user message. An idle agent starts to work; a running one reads it before its next step.

        Args:
            text: any length up to the connection's message limit (64 MiB).
            mode: `interrupt` stops the running turn first and starts another.
            op_id: a UUID that names the call. Any process may repeat the call under the same op_id: there is one
                message, and each call returns what the first returned. None: a fresh one.

        Raises:
            OpMismatch: the op_id was used for another call.
        """
        ...

    async def run(self, timeout: Patience | None = None, *, on_waiting: OnWaiting | None = None) -> Outcome:
        """Wait for the end of the turn; a paused, failed or limited one goes on.

        If the turn of your last message failed before you called `run`, the first `run` returns that outcome and the
        next one tries again. Where there is nothing to do, `run` returns the last outcome. Cancelling it, or the end
        of `timeout` (in seconds), ends the waiting and not the turn.

        Args:
            on_waiting: told what the turn waits for; None: the `on_waiting` that the conversation was made with.
                Where both are None, `run` raises TurnWaits for a missing key and waits for anything else.

        Raises:
            TimedOut: the turn still runs; the message says what the turn waits for.
            TurnWaits: the turn waits for a key and there is no `on_waiting`, or waits for anything and `on_waiting`
                is `"raise"`.
            StateConflict: there is no message yet.
        """
        ...

    async def pause(self) -> None:
        """Ask the turn to stop before its next step; returns at once. `run` goes on."""
        ...

    async def interrupt(self, reason: Reason = "") -> None:
        """Stop the turn now: a model call is dropped, running tools are cancelled; returns when it has ended."""
        ...

    async def respond(
        self, request_id: Name, answer: Literal["approve", "reject"], *, reason: Comment = ""
    ) -> None:
        """Answer an approval. The first answer counts; giving the same answer again changes nothing.

        Raises:
            RequestNotFound: no request with this id waits, or another answer was given before.
        """
        ...

    def events(self, since: Cursor | Seq = 0, follow: bool = False) -> AsyncIterator[Event]:
        """Yield the events after `since` in order; with `follow` go on with new ones until the conversation closes.

        Raises:
            HistoryLost: the log was made anew since the cursor, or meanwhile.
        """
        ...

    async def state(self) -> Snapshot:
        """Return the present state."""
        ...

    async def stats(self) -> Stats:
        """Return what was consumed so far."""
        ...

    async def update_secrets(self, secrets: Secrets) -> None:
        """Set secrets: environment variables of the agent's terminal, masked in what tools return. Never in the log."""
        ...

    async def set_confirmation_policy(self, policy: ConfirmationPolicy) -> None:
        """Decide which tool calls wait for approval, from the next one on."""
        ...

    async def switch_llm(self, llm: Model) -> None:
        """Use another model from the next model call on."""
        ...

    async def set_title(self, title: Title | None = None, *, tags: Tags | None = None) -> None:
        """Name the conversation; tags are merged."""
        ...

    async def close(self) -> None:
        """Close the conversation: a turn that runs here is interrupted, one on a server goes on. The log stays."""
        ...

    async def delete(self) -> None:
        """Interrupt and remove the conversation with its log."""
        ...
