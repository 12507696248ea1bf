"""Whether a turn is open, how far it came, how the last one ended: asked here, and nowhere else.

Two states, each with a table of what may follow what. `TurnState` is what the log says: it is the same
for the process that runs a turn, for one that goes on with it after that has died, and for whoever asks
for the state of the conversation. `Stage` is what the process that runs a turn is about to do with it.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, Literal, Protocol, TypeVar

from agent_sdk.agent.history import History
from agent_sdk.agent.mask import Mask
from agent_sdk.agent.toolbox import FINISH, UNKNOWN
from agent_sdk.cancellation import is_cancelled
from agent_sdk.conversation.contract import Outcome, outcome_of
from agent_sdk.protocol.errors import InternalError, RequestNotFound
from agent_sdk.protocol.events import (
    AgentMessage,
    Event,
    Interrupted,
    PauseRequested,
    RequestOpened,
    RequestResolved,
    RunStatus,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    UserMessage,
)

SOON_SECONDS = 600.0
"""Between two resumptions of a turn: after less than that the turn may itself be what ended the process before."""
ABANDONED = "the process that ran it ended"


S = TypeVar("S", bound="Checked")


class Checked(Enum):
    """A state that only those of FOLLOWING may follow."""

    def then(self: S, after: S) -> S:
        """Return the state that follows.

        Raises:
            InternalError: it cannot follow this one.
        """
        if after not in FOLLOWING[self]:
            raise InternalError(f"a turn that is {self.value} cannot become {after.value}")
        return after


class Phase(Checked):
    """Of the open or last turn, as the log says it."""

    IDLE = "idle"
    """There was none, or nothing is left of the last one to go on with."""
    RUNNING = "running"
    PAUSING = "pausing"
    """It is to end before its next step."""
    STOPPING = "stopping"
    """A user wants it to end at once."""
    PAUSED = "paused"
    LIMITED = "limited"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """It ended before it was done, and nobody wanted that."""
    STOPPED = "stopped"
    """A user has ended it, and has said nothing since: it is to stay so."""


class Stage(Checked):
    """Of a turn, or of all turns of a conversation, in the process that runs them."""

    WORKING = "working"
    LEAVING = "leaving"
    """Another process is to go on: nothing new begins."""
    STOPPING = "stopping"
    """It ends at once: what it calls is cancelled."""
    ENDING = "ending"
    """Its end is decided: a message from now on belongs to the next turn."""


_OPEN = frozenset({Phase.RUNNING, Phase.PAUSING, Phase.STOPPING})
_ENDED = frozenset(Phase) - _OPEN
_ENDS: Mapping[RunStatus, Phase] = {
    "finished": Phase.IDLE,
    "paused": Phase.PAUSED,
    "limit": Phase.LIMITED,
    "failed": Phase.FAILED,
    "interrupted": Phase.INTERRUPTED,
}
# The end of a turn whose start could not be written is written all the same.
FOLLOWING: Mapping[Checked, frozenset[Checked]] = {
    **dict.fromkeys(_ENDED, frozenset({Phase.RUNNING, Phase.STOPPING, *_ENDED})),
    Phase.RUNNING: frozenset({Phase.PAUSING, Phase.STOPPING, *_ENDED} - {Phase.STOPPED}),
    Phase.PAUSING: frozenset({Phase.PAUSING, Phase.STOPPING, *_ENDED} - {Phase.STOPPED}),
    Phase.STOPPING: frozenset({Phase.STOPPING, *_ENDED} - {Phase.INTERRUPTED}),
    Stage.WORKING: frozenset({Stage.LEAVING, Stage.STOPPING, Stage.ENDING}),
    Stage.LEAVING: frozenset({Stage.STOPPING, Stage.ENDING}),
    Stage.STOPPING: frozenset({Stage.ENDING}),
    Stage.ENDING: frozenset(),
}


class TurnState:
    """What the log says of a conversation's turns. Feed it every event in the order of the log."""

    def __init__(self) -> None:
        self.phase = Phase.IDLE
        self.run_id: str | None = None
        """Of the open or last turn."""
        self.outcome: Outcome | None = None
        """How the last turn ended."""
        self.started_seq = self.ended_seq = 0
        """Of the open or last turn."""
        self.open_calls: dict[str, ToolCalled] = {}
        """Calls without a result, by id, in the order they were made."""
        self.answers: dict[str, RequestResolved] = {}
        """By request id, of all turns."""
        self._begin()

    def __repr__(self) -> str:
        return f"<TurnState {self.phase.value}, {self.iterations} steps, {len(self.open_calls)} open calls>"

    def _begin(self) -> None:
        self.generation = 1
        """How many processes have run the turn."""
        self.in_vain = 0
        """How many of them in a row, one soon after the other, brought it no further and waited for nobody."""
        self.iterations = 0
        """How many answers the model has given in it."""
        self.calls = 0
        """How many the model's last answer has."""
        self.requests: dict[str, RequestOpened] = {}
        """Of the last answer's calls, by call id, answered or not."""
        self.concluded: str | None = None
        """What the last answer's `finish` said."""
        self._resumed_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether TurnStarted was written and TurnEnded was not."""
        return self.phase in _OPEN

    @property
    def resumable(self) -> bool:
        """Whether the last turn ended before it was done, and not because somebody wanted it to end."""
        return self.phase in (Phase.PAUSED, Phase.LIMITED, Phase.FAILED, Phase.INTERRUPTED)

    @property
    def failed_run_id(self) -> str | None:
        """Of the last turn, if it has failed or come to its limit."""
        return self.run_id if self.phase in (Phase.FAILED, Phase.LIMITED) else None

    @property
    def pending(self) -> list[RequestOpened]:
        """The requests that wait for an answer."""
        return [request for request in self.requests.values() if request.request_id not in self.answers]

    def answered(self, request_id: str, answer: Literal["approve", "reject"]) -> bool:
        """Return whether a request got this answer before.

        Raises:
            RequestNotFound: it was resolved otherwise.
        """
        resolved = self.answers.get(request_id)
        if resolved is not None and resolved.answer != f"{answer.rstrip('e')}ed":
            raise RequestNotFound(
                f"request_id: {request_id} is {resolved.answer} already, and the first answer counts",
                request=request_id,
            )
        return resolved is not None

    def missing_end(self) -> list[Event]:
        """Return what closes the open turn if nobody runs it any more: void requests, results of calls, TurnEnded."""
        if not self.is_open:
            return []
        return [
            *(
                RequestResolved(request_id=request.request_id, answer="void", reason=ABANDONED)
                for request in self.pending
            ),
            *(
                ToolReturned(
                    call_id=call.call_id, tool=call.tool, text=UNKNOWN.text, is_error=True, data=UNKNOWN.data
                )
                for call in self.open_calls.values()
            ),
            TurnEnded(run_id=self.run_id or "", status="interrupted", reason=ABANDONED),
        ]

    def add(self, event: Event) -> None:
        """Take in the next event of the log.

        Raises:
            InternalError: a turn is begun while one is open.
        """
        match event:
            case TurnStarted():
                self._become(Phase.RUNNING)
                self.run_id, self.started_seq = event.run_id, event.seq
                self._begin()
            case TurnResumed():
                soon = 0 <= event.at - self._resumed_at < SOON_SECONDS
                self.in_vain = 0 if self.pending else self.in_vain + 1 if soon else 1
                self.generation, self._resumed_at = event.generation, event.at
            case AgentMessage():
                self.iterations += 1
                self.calls, self.requests, self.concluded, self.in_vain = event.tool_calls, {}, None, 0
            case ToolCalled():
                self.open_calls[event.call_id] = event
            case ToolReturned():
                self.open_calls.pop(event.call_id, None)
                self.in_vain = 0
                if event.tool == FINISH and not event.is_error:
                    self.concluded = event.text
            case RequestOpened():
                self.requests[event.call_id] = event
            case RequestResolved():
                self.answers[event.request_id] = event
                self.in_vain = 0
            case PauseRequested() if self.phase in (Phase.RUNNING, Phase.PAUSING):
                self._become(Phase.PAUSING)
            case Interrupted():
                self._become(Phase.STOPPING)
            case TurnEnded():
                self._end(event)
            case UserMessage() if self.phase is Phase.STOPPED:
                self._become(Phase.IDLE)
            case _:
                pass

    def _end(self, event: TurnEnded) -> None:
        after = _ENDS[event.status]
        if self.phase is Phase.STOPPING and after is Phase.INTERRUPTED:
            after = Phase.STOPPED
        self._become(after)
        self.run_id, self.outcome, self.ended_seq = event.run_id, outcome_of(event), event.seq

    def _become(self, after: Phase) -> None:
        self.phase = self.phase.then(after)


class Course:
    """The stage of what runs here, and whether it may be left; a turn and its calls share one."""

    def __init__(self) -> None:
        self._stage = Stage.WORKING
        self.unbroken = False
        """Whether it does what no other process could go on with: that is finished before the turn is left."""
        self._broken_off = False

    @property
    def stage(self) -> Stage:
        """Where it is. Setting it raises InternalError where the stage cannot follow."""
        return self._stage

    @stage.setter
    def stage(self, after: Stage) -> None:
        self._stage = self._stage.then(after)

    @property
    def leaving(self) -> bool:
        """Whether another process is to go on."""
        return self._stage is Stage.LEAVING

    @property
    def ending(self) -> bool:
        """Whether its end is decided."""
        return self._stage is Stage.ENDING

    @property
    def left(self) -> bool:
        """Whether it was broken off to be left: what is cancelled in it from then on goes on where it runs."""
        return self._broken_off and self.leaving

    def leave(self) -> None:
        """Have another process go on, where it works."""
        if self._stage is Stage.WORKING:
            self.stage = Stage.LEAVING

    def break_off(self, *, now: bool) -> bool:
        """Leave it where it is, if it is leaving and may be broken off, or has to be: `now`. Return whether it is."""
        self._broken_off = self._broken_off or (self.leaving and (now or not self.unbroken))
        return self.left

    def check(self, *, may_leave: bool = True) -> None:
        """Go on with the work, also after somebody else's code, which may have swallowed its cancellation.

        Args:
            may_leave: another process can begin here.

        Raises:
            CancelledError: it is stopped or cancelled, or it is to be left and may be.
        """
        stage = self._stage
        if stage is Stage.STOPPING or (may_leave and stage is Stage.LEAVING) or is_cancelled():
            raise CancelledError

    def end(self) -> bool:
        """Decide the end; return False where it was decided before."""
        decided = self.ending
        if not decided:
            self.stage = Stage.ENDING
        return not decided

    @contextmanager
    def finishing(self, must: bool = True) -> Iterator[None]:
        """Let nobody leave it in the block, if what is done there `must` be finished here."""
        self.unbroken = must
        try:
            yield
        finally:
            self.unbroken = False


PRESENT: ContextVar[Course] = ContextVar("PRESENT")
"""Of the turn that the present task works for."""


def is_left() -> bool:
    """Return whether what is cancelled in this task goes on where it runs, for the process that goes on with its turn.

    Not what a turn cancels that was stopped, nor what a tool gives up by itself, whatever the process does meanwhile.
    """
    course = PRESENT.get(None)
    return course is not None and course.left


class TurnLog(Protocol):
    """What a turn needs of the log that it writes; the conversation, which is above the agent, provides it."""

    history: History
    mask: Mask
    """Hides what nobody may read in the log."""

    @property
    def turn(self) -> TurnState:
        """What the log says of turns."""
        ...

    def submit(self, *events: Event, op: Any = None) -> Awaitable[Any]:
        """Queue events for the log now; the result comes with the commit. Must not be cancelled."""
        ...

    async def append(self, *events: Event, op: Any = None) -> None:
        """Queue events now and wait for the commit, if there is something to write; cancelling ends the waiting only.

        Args:
            events: one commit's.
            op: the operation they belong to, which is remembered in the same commit.
        """
        ...

    async def mend(self) -> None:
        """Close a turn that nobody runs any more, if there is one."""
        ...

    @property
    def settled(self) -> bool:
        """Whether nothing is queued."""
        ...

    async def settle(self) -> None:
        """Return when nothing is queued any more; without giving way when nothing is."""
        ...

    def delta(self, run_id: str, text: str, thinking: str) -> None:
        """Pass on a transient piece of an answer."""
        ...
