"""What comes from a server to functions here, over however many connections.

Events go to callbacks: each exactly once, in the order of `seq`, none skipped. Calls of tools go to tools, each once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import Raw, Struct

from agent_sdk.cancellation import cancel_and_wait, tell
from agent_sdk.conversation.contract import Callback, Cursor, OnDelta, OnReset, Outcome, outcome_of
from agent_sdk.protocol import events as event_types
from agent_sdk.protocol.errors import AgentServerError, Cancelled, ConnectionLost, HistoryLost, TransferBroken
from agent_sdk.protocol.events import Delta, Event, TurnEnded
from agent_sdk.protocol.methods.conversation import ToolCall, ToolOutput
from agent_sdk.rpc.peer import Inbound
from agent_sdk.tools import FunctionTool

logger = logging.getLogger("agent_sdk")

OUTCOMES_KEPT = 256


class Position(NamedTuple):
    """What a Cursor says, unchecked: there is a new one with every event."""

    epoch: str
    seq: int


class _Reset(Struct, frozen=True):
    """From here on it is another history."""

    start: Position
    error: HistoryLost


class Delivery:
    """The client's end of one conversation's stream of events, over one connection after the other.

    One task hands events over; a slow callback delays later ones and nothing else. What ends the stream
    (no further connection, history gone, a gap) is raised to everybody who waits, after the events before it.
    """

    def __init__(
        self, callbacks: Sequence[Callback], on_delta: OnDelta | None, on_reset: OnReset | None = None
    ) -> None:
        self._callbacks = callbacks
        self._on_delta = on_delta
        self._on_reset = on_reset
        self._queue: asyncio.Queue[Event | Delta | _Reset | AgentServerError] = asyncio.Queue()
        self.moved = asyncio.Event()
        """Set when something has happened; then there is another one."""
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._error: AgentServerError | None = None
        self._resets = 0
        self.taken = Position("", 0)
        """Of the last event that came; where the next connection goes on."""
        self.given = Position("", 0)
        """Of the last event that the callbacks were given."""
        self.since = 0
        """Events up to this seq are not delivered."""
        self.closed = False

    @property
    def started(self) -> bool:
        """Whether a connection brings events."""
        return self._task is not None

    def start(self, after: Position) -> None:
        """Begin after this event; an empty epoch stands for that of the log."""
        self.since = after.seq
        self.taken = self.given = after
        self._task = asyncio.create_task(self._deliver())

    def begin_epoch(self, epoch: str) -> None:
        """Learn the epoch of the log, where it was not known."""
        if not self.taken.epoch:
            self.taken = Position(epoch, self.taken.seq)
            self.given = Position(epoch, self.given.seq)

    def take(self, epoch: str, raws: Sequence[Raw]) -> list[Event]:
        """Accept events as they arrive; known ones are dropped, a gap ends the stream. Returns the new ones."""
        if self._error is not None or self.closed:
            return []
        self.begin_epoch(epoch)
        if epoch != self.taken.epoch:
            self.reset("the log was made anew", Position(epoch, 0))
        new: list[Event] = []
        for raw in raws:
            event = event_types.decode(raw)
            if event.seq <= self.taken.seq:
                continue
            if event.seq != self.taken.seq + 1:
                self.end(TransferBroken(f"event {event.seq} came after event {self.taken.seq}"))
                break
            self.taken = Position(epoch, event.seq)
            self._queue.put_nowait(event)
            new.append(event)
        if new:
            self.wake()
        return new

    def take_delta(self, delta: Delta) -> None:
        """Accept a transient piece."""
        if self._on_delta is not None:
            self._queue.put_nowait(delta)

    def reset(self, reason: str, start: Position) -> None:
        """The history up to here is void; what follows is another one, after `start`. Repeating it does nothing."""
        if self.taken == start:
            return
        error = HistoryLost(
            f"the history of the conversation is gone: {reason}", epoch=start.epoch, from_seq=start.seq + 1
        )
        self.taken = start
        self._queue.put_nowait(_Reset(start, error))

    def end(self, error: AgentServerError) -> None:
        """Nothing more comes: whoever waits hears why, when the callbacks have seen what came before."""
        if self._task is None:
            self._fail(error)
        else:
            self._queue.put_nowait(error)

    async def outcome(self, run_id: str) -> Outcome:
        """Wait until the callbacks have seen the end of this turn.

        Raises:
            HistoryLost: the history it belonged to is gone.
        """
        resets = self._resets
        while run_id not in self._outcomes:
            await self._wait()
            if self._resets != resets:
                raise HistoryLost("the history of the turn is gone", epoch=self.given.epoch, from_seq=1)
        return self._outcomes[run_id]

    async def wait_beyond(self, seq: int) -> bool:
        """Wait until an event after `seq` has come, whatever callbacks do; False: it was closed, there will be none."""
        self.check()
        resets = self._resets
        while self.taken.seq <= seq and resets == self._resets:
            if self.closed:
                return False
            await self._wait()
        return True

    async def close(self) -> None:
        """Stop the delivery; what was not handed over yet is dropped here and stays in the log."""
        self.closed = True
        task, self._task = self._task, None
        if task is not asyncio.current_task():
            await cancel_and_wait(task)
        self.wake()

    def check(self) -> None:
        """Raise what ended the stream, if anything did."""
        if self._error is not None:
            raise self._error

    async def _wait(self) -> None:
        self.check()
        if self.closed:
            raise ConnectionLost("the conversation was closed meanwhile")
        await self.moved.wait()

    def wake(self) -> None:
        """Let everybody who waits look again."""
        # Whoever waits has the old event object; the next wait gets a fresh one.
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def _fail(self, error: AgentServerError) -> None:
        if self._error is None:
            self._error = error
        self.wake()

    async def _deliver(self) -> None:
        while self._error is None and not self.closed:
            match await self._queue.get():
                case Delta() as delta:
                    if self._on_delta is not None:
                        await tell(self._on_delta, delta)
                case _Reset() as reset:
                    await self._restart(reset)
                case AgentServerError() as error:
                    self._fail(error)
                case event:
                    self.given = Position(self.given.epoch, event.seq)
                    for callback in self._callbacks:
                        await tell(callback, event)
                    if isinstance(event, TurnEnded):
                        self._keep(event)

    async def _restart(self, reset: _Reset) -> None:
        if self._on_reset is None:
            self._fail(reset.error)
            return
        self.given = reset.start
        self.since = reset.start.seq
        self._outcomes.clear()
        self._resets += 1
        await tell(self._on_reset, Cursor(*reset.start))
        self.wake()

    def _keep(self, ended: TurnEnded) -> None:
        """Keep how a turn ended, whose end the callbacks have seen, and let those look who wait for it."""
        self._outcomes[ended.run_id] = outcome_of(ended)
        if len(self._outcomes) > OUTCOMES_KEPT:
            self._outcomes.popitem(last=False)
        self.wake()


class ToolCalls:
    """Runs the client tools of one conversation: each call once, however often its server asks for it."""

    def __init__(self, functions: Mapping[str, FunctionTool[..., Any]]) -> None:
        self._functions = functions
        self._runs: dict[str, asyncio.Task[ToolOutput]] = {}
        self._closed = False

    @property
    def names(self) -> list[str]:
        """The tools there are here."""
        return list(self._functions)

    async def answer(self, params: ToolCall, call: Inbound) -> ToolOutput:
        """Run a tool, or attach to its run: one whose connection was lost goes on, and its call comes again.

        Raises:
            Cancelled: the conversation was closed here: somebody else who has the tool is to run it.
        """
        if self._closed:
            raise Cancelled("the conversation was closed here")
        run = self._runs.get(params.request_id)
        if run is None:
            run = self._runs[params.request_id] = asyncio.create_task(self._run(params))
        try:
            await asyncio.wait({run})
        except asyncio.CancelledError:
            if not call.abandoned:
                await self._cancel(params.request_id)
            raise
        return run.result()

    def settled(self, request_id: str) -> None:
        """The server has an answer, or needs none any more."""
        run = self._runs.pop(request_id, None)
        if run is not None:
            run.cancel()

    async def close(self) -> None:
        """Cancel what runs, and run nothing more."""
        self._closed = True
        for request_id in list(self._runs):
            await self._cancel(request_id)

    async def _cancel(self, request_id: str) -> None:
        run = self._runs.pop(request_id, None)
        if run is not None and run is not asyncio.current_task():
            await cancel_and_wait(run)

    async def _run(self, params: ToolCall) -> ToolOutput:
        function = self._functions.get(params.tool)
        if function is None:
            return ToolOutput(text=f"this client has no tool {params.tool!r}", is_error=True)
        result = await function.run(params.arguments)
        return ToolOutput(text=result.text, is_error=result.is_error, data=result.data)
