"""A Conversation there: the verbs as calls, and one ordered stream of events.

Truth is an event in the log; an answer to a call is only a receipt. `run` therefore waits for
TurnEnded in the stream, after every callback has seen it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal, Self, TypeVar

import msgspec
from msgspec import Raw
from msgspec.structs import astuple, replace

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.conversation.contract import (
    Accepted,
    Conversation,
    Cursor,
    OnWaiting,
    Outcome,
    Stats,
    Wait,
    Waits,
    outcome_of,
    still_runs,
    tell_waits,
)
from agent_sdk.definition import ConversationOptions
from agent_sdk.ids import new_id, op_id_or_new
from agent_sdk.protocol import events as event_types
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    HistoryLost,
    InternalError,
    StateConflict,
    TimedOut,
)
from agent_sdk.protocol.events import AgentConfigured, Delta, Event, RequestResolved, TurnEnded, TurnStarted
from agent_sdk.protocol.methods.connection import DeltaNotice, EventsNotice, Initialized, SyncReset
from agent_sdk.protocol.methods.conversation import (
    PAGE_EVENTS,
    Configure,
    Delete,
    EventPage,
    GetEvents,
    GetState,
    Interrupt,
    Pause,
    RegisterTools,
    Respond,
    Run,
    SendMessage,
    SetConfirmationPolicy,
    SetTitle,
    Subscribe,
    Subscribed,
    SwitchLlm,
    ToolCall,
    UpdateSecrets,
)
from agent_sdk.protocol.methods.method import Effect, Method
from agent_sdk.protocol.specs import ConfirmationPolicy, Model, WorkspaceSpec
from agent_sdk.remote.connection import ANSWER_SECONDS, Connection
from agent_sdk.remote.delivery import Delivery, Position, ToolCalls
from agent_sdk.remote.link import Until, ask, ask_page, asking
from agent_sdk.remote.reconnecting import LinkUser, ServerLink
from agent_sdk.remote.workspace import RemoteWorkspace

T = TypeVar("T")


class RemoteConversation(Conversation, LinkUser):
    """A conversation whose turn runs on the server and goes on when this end is gone.

    A connection that is lost is made again: calls under way are asked again and take effect once, events
    go on where they stopped, `run` waits on. While there is no connection, cancelling and `close` return at once.
    """

    def __init__(self, options: ConversationOptions, workspace: RemoteWorkspace) -> None:
        """Describe it; it is opened at its first use.

        Args:
            options: of it. Without an agent it attaches to an existing conversation as it is; with one, the id may be
                that of a conversation that is to be made, and a workspace that nobody has used yet becomes that of the
                conversation.
            workspace: entered already. Its first conversation shares its connection.
        """
        agent = options.agent
        self._options = options
        self._agent = agent.spec() if agent else None
        self._workspace = workspace
        self._tools = ToolCalls(agent.functions() if agent else {})
        self._settings: dict[str, Any] = {
            "max_iterations": options.max_iterations,
            "confirmation": options.confirmation or ConfirmationPolicy(),
            "secrets": dict(options.secrets or {}),
        }
        self._waits = Waits()
        self._known_seq = 0
        """What the state said that came with the connection: events up to this seq change nothing any more."""
        self._out_of_reach: Wait | None = None
        self._unreported: str | None = None
        """The turn that answers the last message or that `run` waited for, until `run` has returned how it ended."""
        self._turn: str | None = None
        """The turn that runs, as far as is known here: what stops it stops no later one, however late it arrives."""
        self._stops: list[Effect[Any]] = []  # calls under way that stop a turn
        self._running = 0  # how many wait for the end of a turn
        self._delivery = Delivery(tuple(options.callbacks), options.on_delta, options.on_reset)
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[ServerLink] | None = None
        self._link: ServerLink | None = None
        self._is_new = False
        self._is_configured = agent is None
        self._id = options.id or ""

    def __repr__(self) -> str:
        return f"<RemoteConversation {self._id or 'new'} at seq {self._delivery.given.seq}>"

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def id(self) -> str:
        return self._id

    @property
    def cursor(self) -> Cursor:
        return Cursor(*self._delivery.given)

    async def send_message(
        self, text: str, *, mode: Literal["enqueue", "interrupt"] = "enqueue", op_id: str | None = None
    ) -> Accepted:
        turn = self._turn if mode == "interrupt" else None
        message = SendMessage(op_id=op_id_or_new(op_id), text=text, mode=mode, turn=turn)
        accepted = await (self._stop(message) if mode == "interrupt" else self._ask(message))
        self._unreported = accepted.run_id
        return accepted

    async def run(self, timeout: float | None = None, *, on_waiting: OnWaiting | None = None) -> Outcome:
        link = Until(await self._open(), timeout)
        waiting = asyncio.create_task(self._outcome(link))
        telling = asyncio.create_task(self._tell_waits(on_waiting or self._options.on_waiting))
        try:
            await asyncio.wait({waiting, telling}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                await telling
            return await waiting
        except TimedOut:
            raise still_runs(timeout, self._waited_for(turn=True)) from None
        finally:
            await cancel_and_wait(waiting, telling)

    async def _outcome(self, link: Until) -> Outcome:
        outcome = await self._wait(link)
        if self._unreported == outcome.run_id:  # else another message has come since
            self._unreported = None
        return outcome

    async def _wait(self, link: Until) -> Outcome:
        while True:
            answer = await ask(link, Run(op_id=new_id(), turn=self._unreported))
            self._unreported = answer.run_id
            self._delivery.check()
            if answer.ended_seq and answer.ended_seq <= self._delivery.since:
                return await self._past_outcome(answer.ended_seq)
            self._running += 1
            self._delivery.wake()
            try:
                async with asyncio.timeout(link.left):
                    return await self._delivery.outcome(answer.run_id)
            except TimeoutError:
                raise TimedOut("the turn still runs") from None
            except HistoryLost:
                if self._options.on_reset is None:
                    raise
            finally:
                self._running -= 1

    async def _tell_waits(self, on_waiting: OnWaiting | None) -> None:
        """Tell what is waited for, again and again; returns only by what `on_waiting` raises."""
        told: set[Wait] = set()
        while True:
            moved = self._delivery.moved  # taken before anybody looks: what happens meanwhile is not missed
            if self._delivery.closed:
                raise ConnectionLost("the conversation was closed meanwhile")
            await tell_waits(self._waited_for(turn=self._running > 0), told, on_waiting)
            await moved.wait()

    def _waited_for(self, *, turn: bool) -> Iterator[Wait]:
        """What nobody here brings by himself: not the key of the own agent, nor a call of an own tool.

        Args:
            turn: whether there is a turn that waits, too.
        """
        if self._out_of_reach is not None:
            yield self._out_of_reach
        for wait in self._waits if turn else ():
            own_key = wait.what == "key" and self._agent is not None
            own_tool = wait.what == "client_tool" and wait.tool in self._tools.names
            if not (own_key or own_tool):
                yield wait

    async def _past_outcome(self, seq: int) -> Outcome:
        """The end of a turn that was over before this end began to listen."""
        page = await self._ask(GetEvents(after=seq - 1, limit=1))
        ended = event_types.decode(page.events[0]) if page.events else None
        if not isinstance(ended, TurnEnded):
            raise InternalError(f"the server says that event {seq} ended the turn, and it did not")
        return outcome_of(ended)

    async def pause(self) -> None:
        await self._stop(Pause(op_id=new_id(), turn=self._turn))

    async def interrupt(self, reason: str = "") -> None:
        await self._stop(Interrupt(op_id=new_id(), reason=reason, turn=self._turn))

    respond = asking(Conversation.respond, Respond)
    state = asking(Conversation.state, GetState)
    set_confirmation_policy = asking(Conversation.set_confirmation_policy, SetConfirmationPolicy)
    set_title = asking(Conversation.set_title, SetTitle)

    async def events(self, since: Cursor | int = 0, follow: bool = False) -> AsyncIterator[Event]:
        """Yield the events after `since` in order; pages of the log are fetched as they are consumed."""
        epoch, seq = (since.epoch, since.seq) if isinstance(since, Cursor) else ("", since)
        while True:
            page = await ask_page(await self._open(), _page_after(seq), PAGE_EVENTS)
            if page.epoch != (epoch := epoch or page.epoch):
                raise HistoryLost("the log was made anew", epoch=page.epoch, from_seq=1)
            for raw in page.events:
                event = event_types.decode(raw)
                seq = event.seq
                yield event
            if page.events and seq < page.head_seq:
                continue
            if not follow or not await self._delivery.wait_beyond(seq):
                return

    async def stats(self) -> Stats:
        return (await self.state()).stats

    async def update_secrets(self, secrets: dict[str, str]) -> None:
        await self._ask(UpdateSecrets(op_id=new_id(), secrets=secrets))
        self._settings["secrets"] |= secrets

    async def switch_llm(self, llm: Model) -> None:
        await self._ask(SwitchLlm(op_id=new_id(), llm=llm))
        if self._agent is not None:
            self._agent = replace(self._agent, llm=llm)

    async def close(self) -> None:
        await self._delivery.close()
        await cancel_and_wait(self._opening)
        if self._link is not None:
            self._link.detach(self)
            self._link = None
        await self._tools.close()
        await self._stack.aclose()

    async def delete(self) -> None:
        await self._open()
        with suppress(ConversationNotFound):  # it was there: the connection was lost before its end was told
            await self._ask(Delete(op_id=new_id()))
        await self.close()

    async def _stop(self, call: Effect[T]) -> T:
        self._stops.append(call)
        try:
            return await self._ask(call)
        finally:
            self._stops.remove(call)

    async def _ask(self, call: Method[T]) -> T:
        return await ask(await self._open(), call)

    # --- opening ---

    async def _open(self) -> ServerLink:
        if self._link is not None and self._is_configured and not self._delivery.closed:
            return self._link
        if self._opening is None and not self._delivery.closed:
            self._workspace.on_close(self.close)
            self._opening = asyncio.create_task(self._really_open())
            self._opening.add_done_callback(self._was_opened)
        if self._opening is not None:
            # Shared by all who come first; one of them being cancelled does not stop it.
            await asyncio.wait({opening := self._opening})
            if not self._delivery.closed:
                return opening.result()
        raise StateConflict("the conversation is closed", state="closed")

    async def _really_open(self) -> ServerLink:
        if self._link is None:
            async with self._workspace.joining:
                self._link = await self._join()
        if not self._is_configured:
            name = {"title": self._options.title, "tags": dict(self._options.tags or {})}
            await ask(self._link, self._configuration(**name))
            self._is_configured = True
        return self._link

    def _was_opened(self, opening: asyncio.Task[ServerLink]) -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # whoever waited for it has it; nobody may have

    async def _join(self) -> ServerLink:
        """Take over the workspace's link where it leads to this conversation or can be led there, else make one."""
        workspace, wanted = self._workspace, self._options.id
        shared = workspace.untouched_link
        if not isinstance(shared, ServerLink) or workspace.conversation is None:
            raise ConversationNotFound("the workspace is not on an agent server; use agent_runs='here'")
        if wanted not in (None, shared.conversation):
            shared = await workspace.become(wanted, make=self._agent is not None) or shared
        if not shared.was_attached and wanted in (None, shared.conversation):
            self._is_new = wanted is None and not workspace.attached
            self._id = shared.conversation
            await shared.attach(self)
            return shared
        self._is_new = wanted is None
        self._id = wanted or new_id()
        share = WorkspaceSpec(share=shared.conversation)
        target = replace(workspace.target, conversation=self._id, workspace=share if self._is_new else None)
        try:
            link = await self._stack.enter_async_context(ServerLink(target))
        except ConversationNotFound:
            if self._is_new or self._agent is None:
                raise
            link = await self._stack.enter_async_context(ServerLink(replace(target, workspace=share)))
        theirs, ours = await link.bound_to(), await shared.bound_to()
        if theirs is not None and ours is not None and theirs.workspace != ours.workspace:
            raise StateConflict(
                f"conversation {self._id} has another workspace than this one, which is in use: enter "
                f"RemoteWorkspace(url, api_key, conversation={self._id!r}) for it",
                state=theirs.state,
            )
        await link.attach(self)
        return link

    def _configuration(self, **name: Any) -> Configure:
        assert self._agent is not None
        return Configure(op_id=new_id(), agent=self._agent, **self._settings, **name)

    # --- what a link tells ---

    async def connected(self, connection: Connection) -> None:
        delivery, peer = self._delivery, connection.peer
        if not delivery.started:
            delivery.start(self._beginning(connection.answer))
        peer.handlers = {**peer.handlers, ToolCall: self._tools.answer}
        for stop in list(self._stops):  # before the subscription, which lets the turn go on
            with suppress(AgentServerError):  # whoever waits for it hears it
                await peer.call(stop, timeout=ANSWER_SECONDS)
        known = delivery.taken
        answer = await peer.call(
            Subscribe(epoch=known.epoch or None, after_seq=known.seq), timeout=ANSWER_SECONDS
        )
        delivery.begin_epoch(answer.epoch)
        reason = _why_void(known, answer)
        if reason and delivery.taken in (known, Position(answer.epoch, known.seq)):
            # A notice says it, too, but later: nobody must learn anything from the wrong history meanwhile.
            delivery.reset(reason, Position(answer.epoch, 0))
        if self._tools.names:
            await peer.call(RegisterTools(tools=self._tools.names), timeout=ANSWER_SECONDS)
        if answer.state is not None:
            self._waits.begin(answer.state.waits)
            lacks = {wait.what for wait in answer.state.waits}
            if "key" in lacks and self._agent is not None and self._is_configured:
                # Its server keeps no keys.
                await peer.call(self._configuration(), timeout=ANSWER_SECONDS)
            if "disk" in lacks and self._running:
                # The turn could not be written down. As long as there is no room this is refused, and tried again.
                await peer.call(Run(op_id=new_id()), timeout=ANSWER_SECONDS)
        self._known_seq, self._out_of_reach = answer.head_seq, None
        delivery.wake()

    def _beginning(self, answer: Initialized) -> Position:
        match self._options.since:
            case Cursor(epoch=epoch, seq=seq):
                return Position(epoch, seq)
            case None:
                is_new = self._is_new or answer.head_seq <= 1  # nothing but its creation
                return Position("", 0 if is_new else answer.head_seq)
            case seq:
                return Position("", seq)

    def noticed(self, method: str, params: Raw) -> None:
        if method == EventsNotice.method:
            notice = msgspec.json.decode(params, type=EventsNotice)
            for event in self._delivery.take(notice.epoch, notice.events):
                if isinstance(event, RequestResolved):
                    self._tools.settled(event.request_id)
                elif isinstance(event, TurnStarted | TurnEnded):
                    self._turn = event.run_id if isinstance(event, TurnStarted) else None
                if event.seq > self._known_seq:
                    self._waits.add(event)
                    # Others may have changed it.
                    if isinstance(event, AgentConfigured) and self._is_configured:
                        self._settings["max_iterations"] = event.max_iterations
                        self._settings["confirmation"] = event.confirmation
        elif method == DeltaNotice.method:
            delta = msgspec.json.decode(params, type=DeltaNotice).delta
            self._delivery.take_delta(msgspec.json.decode(delta, type=Delta))
        elif method == SyncReset.method:
            reset = msgspec.json.decode(params, type=SyncReset)  # `on_reset` is given a Cursor: checked here
            self._delivery.reset(reset.reason, Position(*astuple(Cursor(reset.epoch, reset.from_seq - 1))))

    def unreachable(self, error: AgentServerError) -> None:
        self._out_of_reach = Wait(what="server", reason=f"the server: {error}")
        self._delivery.wake()

    def ended(self, error: AgentServerError) -> None:
        self._delivery.end(error)


def _page_after(seq: int) -> Callable[[int], Method[EventPage]]:
    return lambda limit: GetEvents(after=seq, limit=limit)


def _why_void(known: Position, log: Subscribed) -> str:
    """Why a cursor is no place in this log; empty: it is one."""
    if known.epoch not in ("", log.epoch):
        return "the log was made anew"
    return f"the log ends at {log.head_seq}, before {known.seq}" if known.seq > log.head_seq else ""
