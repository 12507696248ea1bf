"""One conversation's part of the event log: what is appended, what follows from it, who is told, and who asked before.

What is submitted is committed in the order of submission. In the moment the loop learns of a commit,
and before anybody who waited for it goes on, history and state grow and the listeners are called. So
nobody ever hears of an event that is not in the log, and nobody misses one because a waiter was
cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from agent_sdk.agent.history import History
from agent_sdk.agent.mask import Mask, MaskedStream, is_cut
from agent_sdk.agent.turn_state import Phase, TurnState
from agent_sdk.conversation.contract import Cursor, Waits
from agent_sdk.conversation.dispatch import Dispatcher
from agent_sdk.idempotency import Asked, asked
from agent_sdk.ids import digest_of
from agent_sdk.log.event_log import EventLog, Operation, Record
from agent_sdk.protocol.errors import HistoryLost, InvalidParams
from agent_sdk.protocol.events import (
    AgentConfigured,
    AgentMessage,
    ConversationCreated,
    Delta,
    Event,
    ModelFailed,
    ModelUsed,
    SecretsChanged,
    TitleChanged,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    decode,
)
from agent_sdk.protocol.methods.method import Done, Effect
from agent_sdk.protocol.results import Accepted, PendingRequest, Snapshot, State, Stats, Wait

T = TypeVar("T")

_ENDS_AN_ANSWER = (AgentMessage, ModelFailed, TurnEnded, TurnResumed)
"""What is written beside an answer, a title or a message, must not cut a secret in it in two."""

BUFFERED_BYTES = 1 << 20
"""Of events kept for a reader that is slow; one that is slower reads them from the log again."""


class ConversationLog:
    """One conversation's part of the event log: what is appended to it, what follows from it, and who is told."""

    def __init__(self, log: EventLog, conversation: str, epoch: str, delivery: Dispatcher) -> None:
        self.log = log
        self.conversation = conversation
        self.operations = log.operations(conversation)
        self.epoch = epoch
        self.history = History()
        self.state = ConversationState()
        self.turn = self.state.turn
        """What the log says of turns."""
        self.delivery = delivery
        self.mask = Mask()
        """Hides secrets in all that is written and published: the one place where that is done for clients."""
        self._streams: tuple[str, MaskedStream, MaskedStream] | None = None
        """The turn whose answer is streamed, its text and its thinking."""
        self._under_way: set[asyncio.Future[list[Record]]] = set()
        self._reducers: list[Callable[[Event], None]] = []
        self.tails: set[Tail] = set()
        """Who reads it now."""

    @property
    def head_seq(self) -> int:
        """The seq of the last event."""
        return self.history.head_seq

    async def replay(self) -> None:
        """Take in what the log has already; nobody is told of it. A damaged end is cut off.

        Raises:
            ConversationDamaged: the damage is not at the end.
        """
        while page := await self.log.read(self.conversation, self.head_seq, mend=True):
            for _, body in page:
                self._grow(decode(body))
        self.epoch = await self.log.epoch(self.conversation)

    async def reduce(self, reducer: Callable[[Event], None]) -> None:
        """Call it with every event that the log has, and from then on with every new one, before anybody is told."""
        async for _, body in self.pages(0):
            reducer(decode(body))
        self._reducers.append(reducer)

    async def pages(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (seq, JSON) of the events after a seq, up to the head.

        The file may be ahead of the head for a moment. An event that the state does not know of yet is not
        shown to anybody, or whoever sees it and asks for the state would be told the state before it.
        """
        while after < self.head_seq:
            page = await self.log.read(self.conversation, after)
            if not page:
                return
            for seq, body in page:
                if seq > self.head_seq:
                    return
                after = seq
                yield seq, body

    def past(self, since: Cursor) -> AsyncIterator[Event]:
        """Return the events after a cursor, up to the present head.

        Raises:
            HistoryLost: it is of another history.
        """
        head, epoch = self.head_seq, self.epoch
        if since.epoch not in ("", epoch) or not 0 <= since.seq <= head:
            raise HistoryLost(
                f"the log has no seq {since.seq} of epoch {since.epoch[:64]!r}; it is epoch {epoch!r} up to {head}",
                epoch=epoch,
                from_seq=1,
            )

        async def events() -> AsyncIterator[Event]:
            async for seq, body in self.pages(since.seq):
                if seq > head:
                    return
                yield decode(body)

        return events()

    def submit(
        self,
        *events: Event,
        op: Operation | None = None,
        settings: tuple[bytes, bytes | None] | None = None,
    ) -> asyncio.Future[list[Record]]:
        """Queue events; the future comes with the commit, after all who follow were told. Do not cancel it."""
        written: Sequence[Event] = events
        if self.mask.needles.longest or self._streams is not None:
            if ends := [event for event in events if isinstance(event, _ENDS_AN_ANSWER)]:
                self._end_streams(cut=not isinstance(ends[0], AgentMessage) or is_cut(ends[0]))
            begun = bool(ends) and self.history.was_cut
            written = [self.mask.event(event, begun=begun) for event in events]
        future = self.log.submit(self.conversation, written, op=op, settings=settings)
        self._under_way.add(future)
        future.add_done_callback(self._committed)
        return future

    async def append(self, *events: Event, op: Operation | None = None) -> None:
        """Queue events and wait for the commit, if there is something to write; cancelling ends the waiting only.

        Raises:
            StorageFull, WorkspaceUnavailable, LeaseLost: nothing of it was written.
        """
        if events or op is not None:
            await asyncio.shield(self.submit(*events, op=op))

    async def answered(self, op: Operation | None, result: type[T]) -> T | None:
        """Return what this call answered before; None when it did not come before.

        Raises:
            OpMismatch: another call came with this op_id.
            OpExpired: it is too long ago.
        """
        known = op and await self.operations.find(Asked(op.op_id, op.digest))
        return None if not known or known.answer is None else msgspec.json.decode(known.answer, type=result)

    async def mend(self) -> None:
        """Close a turn that nobody runs any more, if there is one."""
        await self.append(*self.turn.missing_end())

    @property
    def settled(self) -> bool:
        """Whether nothing is queued."""
        return not self._under_way

    async def settle(self) -> None:
        """Return when nothing is queued any more; without giving way when nothing is."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def end_tails(self) -> None:
        """Tell who reads it that nothing will come any more."""
        for tail in self.tails:
            tail.end()

    def delta(self, run_id: str, text: str, thinking: str) -> None:
        """Pass on a transient piece of an answer, as far as it can be no part of a secret."""
        if not self.mask.needles.longest and self._streams is None:
            self._publish(run_id, text, thinking)
            return
        if self._streams is None or self._streams[0] != run_id:
            self._end_streams(cut=True)
            begun = MaskedStream(self.mask, begun=self.history.was_cut)
            self._streams = run_id, begun, MaskedStream(self.mask)
        _, texts, thoughts = self._streams
        self._publish(run_id, texts.feed(text), thoughts.feed(thinking))

    def _end_streams(self, *, cut: bool) -> None:
        """Pass on what was held: the answer is written, or goes on no more, for it was cut."""
        if self._streams is not None:
            run_id, texts, thoughts = self._streams
            self._streams = None
            self._publish(run_id, texts.flush(cut=cut), thoughts.flush(cut=cut))

    def _publish(self, run_id: str, text: str, thinking: str) -> None:
        if text or thinking:
            delta = Delta(run_id=run_id, after_seq=self.head_seq, text=text, thinking=thinking)
            self.delivery.publish_delta(delta)

    def _committed(self, future: asyncio.Future[list[Record]]) -> None:
        self._under_way.discard(future)
        if future.cancelled() or future.exception() is not None:
            return
        for event, body in future.result():
            self._grow(event)
            self.delivery.publish(event, body)

    def _grow(self, event: Event) -> None:
        self.history.add(event)
        self.state.add(event)
        for reducer in self._reducers:
            reducer(event)


class Tail:
    """One reader of a conversation's log: first what it has, then live, without a gap. Unsubscribe it by `close`."""

    def __init__(self, log: ConversationLog, since: int) -> None:
        self._log = log
        self._seq = since
        self._buffer: deque[tuple[int, bytes]] = deque()
        self._buffered = 0
        self._behind = True
        self._ended = False
        self._news = asyncio.Event()
        self._unsubscribe = log.delivery.subscribe(self._listen)
        log.tails.add(self)

    async def events(self, *, follow: bool) -> AsyncIterator[Event]:
        """Yield the events after `since`; with `follow` go on until `end`."""
        while True:
            if self._behind:
                self._behind = False
                async for seq, body in self._log.pages(self._seq):
                    self._seq = seq
                    yield decode(body)
            while self._buffer:
                seq, body = self._buffer.popleft()
                self._buffered -= len(body)
                if seq > self._seq:
                    self._seq = seq
                    yield decode(body)
            if self._behind:
                continue
            if not follow or self._ended:
                return
            self._news.clear()
            await self._news.wait()

    def end(self) -> None:
        """Nothing will come any more; what came is still yielded."""
        self._ended = True
        self._news.set()

    def close(self) -> None:
        """Stop listening."""
        self._log.tails.discard(self)
        self._unsubscribe()

    def _listen(self, seq: int, body: bytes) -> None:
        if not self._behind:
            self._buffer.append((seq, body))
            self._buffered += len(body)
            if self._buffered > BUFFERED_BYTES and len(self._buffer) > 1:
                self._buffer.clear()
                self._buffered, self._behind = 0, True
        self._news.set()


def operation(params: Effect[Any]) -> Operation:
    """Return the log's row for a call; it answers that it is done, unless another result comes later.

    What is secret leaves no trace, not even a digest that could be guessed at.
    """
    fields = asked(params)
    if "secrets" in fields:
        fields["secrets"] = sorted(fields["secrets"])
    llm = fields.get("llm") or fields.get("agent", {}).get("llm", {})
    for name in ("api_key", "headers"):
        llm.pop(name, None)
    return Operation(params.op_id, digest_of(params.method, fields), msgspec.json.encode(Done()))


def with_result(op: Operation | None, result: Any) -> Operation | None:
    """Return the row with what the call answers."""
    return None if op is None else replace(op, result=msgspec.json.encode(result))


def with_acceptance(op: Operation | None, run_id: str) -> Operation | None:
    """Return the row of a message; what it answers is made when the message has its seq."""
    if op is None:
        return None
    return replace(op, result=lambda events: msgspec.json.encode(Accepted(events[0].seq, run_id)))


def check_text(text: str) -> None:
    """Accept the text of a message.

    Raises:
        InvalidParams: the text is empty or cannot be UTF-8.
    """
    if not text.strip():
        raise InvalidParams("text: a message needs at least one character that is not white space")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        half = f"character {exc.start} is half of a surrogate pair, which UTF-8 cannot say"
        raise InvalidParams(f"text: {half}") from None


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
