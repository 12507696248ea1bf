"""Method class to coroutine: what a conversation of this server answers, over a WebSocket and over plain HTTP alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import structlog
from msgspec import Raw

from agent_sdk.agent.mask import check_secrets, hidden_in
from agent_sdk.conversation.receipts import operation
from agent_sdk.log.event_log import Operation
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, StateConflict
from agent_sdk.protocol.methods import (
    WORKSPACE,
    Configure,
    Delete,
    Done,
    Download,
    Effect,
    EventPage,
    GetEvents,
    GetState,
    Interrupt,
    ListConversations,
    Method,
    Pause,
    PauseWorkspace,
    Ping,
    Pong,
    RegisterTools,
    Respond,
    ResumeWorkspace,
    Run,
    RunAnswer,
    SendMessage,
    SetConfirmationPolicy,
    SetTitle,
    SnapshotTaken,
    SnapshotWorkspace,
    SwitchLlm,
    UpdateSecrets,
    all_methods,
    result_type,
)
from agent_sdk.protocol.results import BUSY, Accepted, Snapshot
from agent_sdk.rpc.peer import Handler, Inbound
from agent_server.conversations.hosted import Hosted
from agent_server.conversations.registry import Conversations
from agent_server.metrics import Metrics
from agent_server.work import Work

T = TypeVar("T")

Handlers = dict[type[Method[Any]], Handler]


class HttpCall(Inbound):
    """A call that came over plain HTTP: there are no byte streams, and nobody to call back."""

    __slots__ = ()

    def reading(self, channel: int) -> Any:
        """Refuse."""
        raise needs_a_websocket()

    def writing(self, channel: int) -> Any:
        """Refuse."""
        raise needs_a_websocket()


def needs_a_websocket() -> InvalidParams:
    """Return the error for what plain HTTP cannot do."""
    return InvalidParams("this needs a WebSocket: the method moves bytes or calls back")


def conversation_handlers(hosted: Hosted, conversations: Conversations) -> Handlers:
    """Return who answers what for a conversation; `initialize` and `events.subscribe` belong to the connection."""
    answers = _Answers(hosted, conversations)
    return {
        **hosted.relay.handlers(),
        Configure: answers.configure,
        RegisterTools: answers.register_tools,
        SendMessage: answers.send_message,
        Run: answers.run,
        Pause: answers.pause,
        Interrupt: answers.interrupt,
        Respond: answers.respond,
        GetState: answers.state,
        GetEvents: answers.events,
        UpdateSecrets: answers.update_secrets,
        SetConfirmationPolicy: answers.set_confirmation_policy,
        SwitchLlm: answers.switch_llm,
        SetTitle: answers.set_title,
        Delete: answers.delete,
        PauseWorkspace: answers.pause_workspace,
        ResumeWorkspace: answers.resume_workspace,
        SnapshotWorkspace: answers.snapshot_workspace,
        **server_handlers(conversations),
    }


class _Answers:
    def __init__(self, hosted: Hosted, conversations: Conversations) -> None:
        self._hosted = hosted
        self._local = hosted.local
        self._conversations = conversations

    async def configure(self, params: Configure, call: Inbound) -> Done:
        async def act(op: Operation) -> Done:
            agent = params.agent
            check_secrets(params.secrets)
            self._hosted.mask([*hidden_in(agent.llm), *params.secrets.values()])
            await self._local.configure(
                agent,
                max_iterations=params.max_iterations,
                confirmation=params.confirmation,
                secrets=params.secrets,
                title=params.title,
                tags=params.tags,
                op=op,
            )
            await self._conversations.note(self._hosted)
            return Done()

        await self._once(params, act)
        if params.agent.client_tools and not isinstance(call, HttpCall):
            self._hosted.tools.register(call.peer, [tool.name for tool in params.agent.client_tools])
        return Done()

    async def register_tools(self, params: RegisterTools, call: Inbound) -> Done:
        if isinstance(call, HttpCall):
            raise needs_a_websocket()
        self._hosted.tools.register(call.peer, params.tools)
        return Done()

    async def send_message(self, params: SendMessage, call: Inbound) -> Accepted:
        op = operation(params)

        async def act() -> Accepted:
            with self._hosted.turn_admitted():
                return await self._local.send_message(params.text, mode=params.mode, stops=params.turn, op=op)

        return await self._hosted.ledger.run(params, act)

    async def run(self, params: Run, call: Inbound) -> RunAnswer:
        async def act(op: Operation) -> RunAnswer:
            with self._hosted.turn_admitted():
                return await self._local.begin(untold=params.turn, op=op)

        return await self._once(params, act)

    async def pause(self, params: Pause, call: Inbound) -> Done:
        return await self._done(params, lambda op: self._local.pause(run_id=params.turn, op=op))

    async def interrupt(self, params: Interrupt, call: Inbound) -> Done:
        return await self._done(
            params, lambda op: self._local.interrupt(params.reason, run_id=params.turn, op=op)
        )

    async def respond(self, params: Respond, call: Inbound) -> Done:
        return await self._done(
            params,
            lambda op: self._local.respond(params.request_id, params.answer, reason=params.reason, op=op),
        )

    async def state(self, params: GetState, call: Inbound) -> Snapshot:
        return await self._hosted.state()

    async def events(self, params: GetEvents, call: Inbound) -> EventPage:
        page = await self._hosted.page(params.after, params.limit)
        return EventPage(
            epoch=self._hosted.epoch, events=[Raw(event) for _, event in page], head_seq=self._hosted.head_seq
        )

    async def update_secrets(self, params: UpdateSecrets, call: Inbound) -> Done:
        check_secrets(params.secrets)
        self._hosted.mask(params.secrets.values())
        return await self._done(params, lambda op: self._local.update_secrets(params.secrets, op=op))

    async def set_confirmation_policy(self, params: SetConfirmationPolicy, call: Inbound) -> Done:
        return await self._done(params, lambda op: self._local.set_confirmation_policy(params.policy, op=op))

    async def switch_llm(self, params: SwitchLlm, call: Inbound) -> Done:
        async def act(op: Operation) -> None:
            self._hosted.mask(hidden_in(params.llm))
            await self._local.switch_llm(params.llm, op=op)
            await self._conversations.note(self._hosted)

        return await self._done(params, act)

    async def set_title(self, params: SetTitle, call: Inbound) -> Done:
        async def act(op: Operation) -> None:
            await self._local.set_title(params.title, tags=params.tags, op=op)
            await self._conversations.note(self._hosted)

        return await self._done(params, act)

    async def delete(self, params: Delete, call: Inbound) -> Done:
        """Its row goes with the log: a repeat after a restart finds no conversation, which is as good an answer."""

        async def act(op: Operation) -> None:
            state = (await self._local.state()).state
            if params.unless_busy and state in BUSY:
                raise StateConflict(f"the conversation is {state}", state=state)
            await self._conversations.delete(self._hosted, caller=call.peer)

        return await self._done(params, act)

    async def pause_workspace(self, params: PauseWorkspace, call: Inbound) -> Done:
        async def act() -> Done:
            await self._hosted.link.pause()
            return Done()

        return await self._hosted.ledger.run(params, act)

    async def resume_workspace(self, params: ResumeWorkspace, call: Inbound) -> Done:
        async def act() -> Done:
            await self._hosted.link.resume()
            return Done()

        return await self._hosted.ledger.run(params, act)

    async def snapshot_workspace(self, params: SnapshotWorkspace, call: Inbound) -> SnapshotTaken:
        return await self._hosted.ledger.run(params, lambda: self._conversations.snapshot(self._hosted))

    async def _done(self, params: Effect[Done], action: Callable[[Operation], Awaitable[None]]) -> Done:
        async def act(op: Operation) -> Done:
            await action(op)
            return Done()

        return await self._once(params, act)

    async def _once(self, params: Effect[T], action: Callable[[Operation], Awaitable[T]]) -> T:
        """Attach to the call of this op_id that runs, or return what it answered in whatever process, or run it."""
        op = operation(params)
        kind = result_type(type(params))

        async def act() -> T:
            known: T | None = await self._local.answered(op, kind)
            return await action(op) if known is None else known

        return await self._hosted.ledger.run(params, act)


def server_handlers(conversations: Conversations) -> Handlers:
    """Return who answers what concerns no particular conversation."""

    async def list_conversations(params: ListConversations, call: Inbound) -> list[Snapshot]:
        return await conversations.snapshots(params)

    async def ping(params: Ping, call: Inbound) -> Pong:
        return Pong()

    return {ListConversations: list_conversations, Ping: ping}


class Counter:
    """Goes around every handler: counts and times the calls, and binds log lines to the conversation."""

    def __init__(self, metrics: Metrics, work: Work) -> None:
        self._metrics = metrics
        self._work = work
        rooms = {room: metrics.call_seconds.labels(room) for room in ("workspace", "conversation")}
        self._seconds = {
            method: rooms["workspace" if method in WORKSPACE else "conversation"]
            for method in all_methods().values()
        }

    def around(self, handlers: Handlers, hosted: Hosted | None = None) -> Handlers:
        """Return the handlers with this around them. There is a table per conversation, so entries are small."""
        about = {} if hosted is None else {"conversation": hosted.id}
        return {method: partial(self._answer, method, handler, about) for method, handler in handlers.items()}

    async def _answer(
        self, method: type[Method[Any]], handler: Handler, about: dict[str, str], params: Any, call: Inbound
    ) -> Any:
        outcome, began = "ok", time.monotonic()
        # What changes something is counted by the ledger.
        working = self._work.under_way() if method is Download else nullcontext()
        try:
            with structlog.contextvars.bound_contextvars(method=method.method, **about), working:
                return await handler(params, call)
        except AgentServerError as exc:
            outcome = exc.kind
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            outcome = "bug"
            raise
        finally:
            self._seconds[method].observe(time.monotonic() - began)
            self._metrics.calls.labels(method.method, outcome).inc()
