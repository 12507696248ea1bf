"""What this server answers, over a WebSocket and over plain HTTP alike: one table, one dispatcher; and `initialize`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from msgspec import Raw
from msgspec.structs import asdict

from agent_sdk.agent.mask import check_secrets, hidden_in
from agent_sdk.conversation.log import operation
from agent_sdk.log.event_log import Operation
from agent_sdk.protocol.errors import AgentServerError, ConversationNotFound, InvalidParams, StateConflict
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize, Initialized, Ping, Pong
from agent_sdk.protocol.methods.conversation import (
    CONVERSATION,
    Configure,
    Delete,
    EventPage,
    GetEvents,
    GetState,
    Interrupt,
    ListConversations,
    Pause,
    RegisterTools,
    Run,
    RunAnswer,
    SendMessage,
    SetTitle,
    Subscribe,
    Subscribed,
    SwitchLlm,
    UpdateSecrets,
)
from agent_sdk.protocol.methods.method import Done, Effect, Method, result_type
from agent_sdk.protocol.methods.workspace import (
    WORKSPACE,
    Download,
    PauseWorkspace,
    ResumeWorkspace,
    SnapshotWorkspace,
)
from agent_sdk.protocol.results import BUSY, Accepted
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.version import __version__
from agent_sdk.workspace.verbs import arguments_of
from agent_server.config.options import ServerConfig
from agent_server.conversations.loaded import LoadedConversation
from agent_server.conversations.registry import Conversations
from agent_server.conversations.workspace import SHOWN_ID
from agent_server.logs import ABOUT
from agent_server.metrics import Metrics
from agent_server.work import Work

NEW = "new"
SERVER = ClientInfo(name="agent-server", version=__version__)
_LEAST = Limits(
    frame_bytes=1,
    message_bytes=64 << 10,
    payload_bytes=1,
    calls=1,
    window_bytes=1,
    queue_bytes=1,
    json_depth=1,
)
OF_THE_SERVER = frozenset({ListConversations.method, Ping.method})
"""Methods that concern no particular conversation."""


class Caller(Protocol):
    """Whose call is answered: a WebSocket, or one request over plain HTTP."""

    conversation: LoadedConversation
    """The conversation of its calls; there is none yet for `initialize`, and need not be one for `OF_THE_SERVER`."""
    about: dict[str, Any]
    """What the log lines of its calls tell."""

    async def initialize(self, params: Initialize) -> Initialized:
        """Answer the first message of a WebSocket."""
        ...

    async def subscribe(self, params: Subscribe) -> Subscribed:
        """Begin to send events over a WebSocket."""
        ...


Handler = Callable[[Caller, Any, Inbound], Awaitable[Any]]
Action = Callable[[LoadedConversation, Any, Operation], Awaitable[Any]]


class HttpCall(Inbound):
    """A call over plain HTTP and its caller in one: there are no byte streams, and nobody to call back."""

    __slots__ = ("about", "conversation")

    def __init__(self, id: Any, conversation: LoadedConversation | None) -> None:
        super().__init__(Peer(memory_pipes()[0], opener=False), id)
        self.about = {"call": id}
        if conversation is not None:
            self.conversation = conversation
            self.about["conversation"] = conversation.id

    def reading(self, channel: int) -> Any:
        """Refuse."""
        raise needs_a_websocket()

    def writing(self, channel: int, since: int = 0) -> Any:
        """Refuse."""
        raise needs_a_websocket()

    async def initialize(self, params: Initialize) -> Initialized:
        """Refuse: plain HTTP has an answer of its own."""
        raise needs_a_websocket()

    async def subscribe(self, params: Subscribe) -> Subscribed:
        """Refuse."""
        raise needs_a_websocket()


def needs_a_websocket() -> InvalidParams:
    """Return the error for what plain HTTP cannot do."""
    return InvalidParams("this needs a WebSocket: the method moves bytes or calls back")


class Methods:
    """The handler of every method, and the dispatcher around all of them; one for all conversations of a server."""

    def __init__(self, conversations: Conversations, metrics: Metrics, work: Work) -> None:
        self._conversations = conversations
        self._metrics = metrics
        self._work = work
        self.handlers: dict[type[Method[Any]], Handler] = {
            **{method: self._change if issubclass(method, Effect) else _forward for method in WORKSPACE},
            **dict.fromkeys(CONVERSATION, self._once(_verb)),
            Download: self._download,
            Initialize: lambda caller, params, call: caller.initialize(params),
            Subscribe: lambda caller, params, call: caller.subscribe(params),
            Configure: self._configure,
            RegisterTools: _register_tools,
            SendMessage: self._once(_send_message, stored=False),
            Run: self._once(_run),
            Pause: self._once(lambda loaded, params, op: loaded.local.pause(run_id=params.turn, op=op)),
            Interrupt: self._once(
                lambda loaded, params, op: loaded.local.interrupt(params.reason, run_id=params.turn, op=op)
            ),
            GetState: lambda caller, params, call: caller.conversation.state(),
            GetEvents: _events,
            UpdateSecrets: self._update_secrets,
            SwitchLlm: self._once(self._noted),
            SetTitle: self._once(self._noted),
            Delete: self._delete,
            PauseWorkspace: self._once(lambda loaded, params, op: loaded.link.pause(), stored=False),
            ResumeWorkspace: self._once(lambda loaded, params, op: loaded.link.resume(), stored=False),
            SnapshotWorkspace: self._once(
                lambda loaded, params, op: conversations.snapshot(loaded), stored=False
            ),
            ListConversations: lambda caller, params, call: conversations.snapshots(params),
            Ping: _ping,
        }
        self.over_http = {
            method.method: method for method in self.handlers if method not in (Initialize, Subscribe)
        }
        """By name, what plain HTTP may ask for beside `initialize`."""
        rooms = {room: metrics.call_seconds.labels(room) for room in ("workspace", "conversation")}
        self._seconds = {
            method: rooms["workspace" if method in WORKSPACE else "conversation"] for method in self.handlers
        }

    async def answer(self, caller: Caller, params: Any, call: Inbound) -> Any:
        """Answer one call: count it, time it, and have log lines tell what they are about."""
        method: type[Method[Any]] = type(params)
        outcome, began = "ok", time.monotonic()
        before = ABOUT.set({**caller.about, "method": method.method})
        try:
            return await self.handlers[method](caller, params, call)
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
            ABOUT.reset(before)
            self._seconds[method].observe(time.monotonic() - began)
            self._metrics.calls(method.method, outcome).inc()

    # --- once per op_id ---

    def _once(self, action: Action, *, stored: bool = True) -> Handler:
        """Return the handler that does something once per op_id; `stored`: the log keeps what it answered."""
        return partial(self._run_once, action, stored)

    async def _run_once(
        self, action: Action, stored: bool, caller: Caller, params: Effect[Any], call: Inbound
    ) -> Any:
        """Attach to the call of this op_id that runs, or return what it answered in whatever process, or run it.

        It goes on when its caller loses the connection. While the server drains no new one begins.
        """
        loaded, op = caller.conversation, operation(params)

        async def act() -> Any:
            self._work.admit()
            with self._work.under_way():
                if stored:
                    known = await loaded.local.answered(op, result_type(type(params)))
                    if known is not None:
                        return known
                answer = await action(loaded, params, op)
                return Done() if answer is None else answer

        return await loaded.operations.run(params, act, call)

    # --- what changes a conversation ---

    async def _configure(self, caller: Caller, params: Configure, call: Inbound) -> Done:
        await self._run_once(self._set_agent, True, caller, params, call)
        if params.agent.client_tools and not isinstance(call, HttpCall):
            caller.conversation.tools.register(call.peer, [tool.name for tool in params.agent.client_tools])
        return Done()

    async def _set_agent(self, loaded: LoadedConversation, params: Configure, op: Operation) -> None:
        check_secrets(params.secrets)
        loaded.mask([*hidden_in(params.agent.llm), *params.secrets.values()])
        await loaded.local.configure(
            params.agent,
            max_iterations=params.max_iterations,
            confirmation=params.confirmation,
            secrets=params.secrets,
            title=params.title,
            tags=params.tags,
            op=op,
        )
        await self._conversations.note(loaded)

    async def _update_secrets(self, caller: Caller, params: UpdateSecrets, call: Inbound) -> Any:
        check_secrets(params.secrets)
        caller.conversation.mask(params.secrets.values())
        return await self._run_once(_verb, True, caller, params, call)

    async def _noted(self, loaded: LoadedConversation, params: Effect[Any], op: Operation) -> None:
        """Call the verb that the method is named after, and keep what of it the list shows."""
        await _verb(loaded, params, op)
        await self._conversations.note(loaded)

    async def _delete(self, caller: Caller, params: Delete, call: Inbound) -> Any:
        """Its row goes with the log: a repeat after a restart finds no conversation, which is as good an answer."""

        async def delete(loaded: LoadedConversation, params: Delete, op: Operation) -> None:
            state = (await loaded.local.state()).state
            if params.unless_busy and state in BUSY:
                raise StateConflict(f"the conversation is {state}", state=state)
            await self._conversations.delete(loaded, caller=call.peer)

        return await self._run_once(delete, True, caller, params, call)

    async def _change(self, caller: Caller, params: Effect[Any], call: Inbound) -> Any:
        """Let a call to the box begin while the server takes calls; its end then waits for it."""
        self._work.admit()
        with self._work.under_way():
            return await _forward(caller, params, call)

    # --- what changes nothing ---

    async def _download(self, caller: Caller, params: Download, call: Inbound) -> Any:
        with self._work.under_way():  # the end of the server waits for it, too
            return await _forward(caller, params, call)


def _forward(caller: Caller, params: Method[Any], call: Inbound) -> Awaitable[Any]:
    return caller.conversation.forwarded.answer(params, call)


async def _verb(loaded: LoadedConversation, params: Effect[Any], op: Operation) -> Any:
    """Call the verb that the method is named after."""
    if isinstance(params, SwitchLlm):
        loaded.mask(hidden_in(params.llm))
    return await getattr(loaded.local, params.method)(**arguments_of(params), op=op)


async def _register_tools(caller: Caller, params: RegisterTools, call: Inbound) -> Done:
    if isinstance(call, HttpCall):
        raise needs_a_websocket()
    caller.conversation.tools.register(call.peer, params.tools)
    return Done()


async def _send_message(loaded: LoadedConversation, params: SendMessage, op: Operation) -> Accepted:
    with loaded.turn_admitted():
        return await loaded.local.send_message(params.text, mode=params.mode, stops=params.turn, op=op)


async def _run(loaded: LoadedConversation, params: Run, op: Operation) -> RunAnswer:
    with loaded.turn_admitted():
        return await loaded.local.begin(unreported=params.turn, op=op)


async def _events(caller: Caller, params: GetEvents, call: Inbound) -> EventPage:
    loaded = caller.conversation
    page = await loaded.page(params.after, params.limit)
    return EventPage(epoch=loaded.epoch, events=[Raw(event) for _, event in page], head_seq=loaded.head_seq)


async def _ping(caller: Caller, params: Ping, call: Inbound) -> Pong:
    return Pong()


# --- initialize ---


def check_initialize(params: Initialize) -> None:
    """Accept the params of `initialize`.

    Raises:
        InvalidParams: another version, or limits with which nothing could be sent.
    """
    if params.protocol_version != PROTOCOL_VERSION:
        older = "server" if params.protocol_version > PROTOCOL_VERSION else "client"
        raise InvalidParams(
            f"$.params.protocol_version: this server ({SERVER.name} {SERVER.version}) speaks {PROTOCOL_VERSION}, got "
            f"{params.protocol_version}; the {older} is the older one, update it",
            supported=[PROTOCOL_VERSION],
        )
    for name, value in asdict(_LEAST).items():
        if getattr(params.limits, name) < value:
            raise InvalidParams(f"$.params.limits.{name}: expected int >= {value}")


async def named_or_new(conversations: Conversations, work: Work, wanted: str, params: Initialize) -> str:
    """Return the id of the conversation a client is bound to, which is made when it wants a new one.

    Raises:
        ConversationNotFound: there is none of that id.
        InvalidParams: a workspace is described for an existing one, or an id is chosen.
        OpMismatch: the chosen id is taken, by a conversation with another workspace.
        Overloaded: a new one, and the server drains.
    """
    if wanted == NEW:
        if params.conversation is None or params.conversation not in conversations:
            work.admit()
        return await conversations.create(params.workspace, params.conversation)
    if wanted not in conversations:
        raise ConversationNotFound(f"no conversation {wanted[:SHOWN_ID]!r}", conversation=wanted[:SHOWN_ID])
    if params.conversation is not None:
        raise InvalidParams("$.params.conversation: an existing conversation has its id already")
    if params.workspace is not None:
        raise InvalidParams("$.params.workspace: an existing conversation has its workspace already")
    return wanted


async def initialized(config: ServerConfig, loaded: LoadedConversation, connection: str) -> Initialized:
    """Return the answer to `initialize`."""
    state = await loaded.state()
    return Initialized(
        protocol_version=PROTOCOL_VERSION,
        server=SERVER,
        limits=config.limits,
        connection_id=connection,
        heartbeat_s=config.heartbeat_seconds,
        conversation=loaded.id,
        epoch=state.epoch,
        head_seq=state.head_seq,
        state=state,
    )
