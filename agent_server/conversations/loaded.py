"""One conversation while it is in this server's memory, with everything that belongs to it and who uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

import msgspec
from msgspec.structs import replace

from agent_sdk.agent.runtime import Place
from agent_sdk.agent.turn_state import is_left
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.conversation.store import AgentStore
from agent_sdk.idempotency import IdempotencyStore, InMemory
from agent_sdk.log.event_log import PAGE_EVENTS, EventLog
from agent_sdk.protocol.errors import AgentServerError, Cancelled, ConnectionLost, OutcomeUnknown, draining
from agent_sdk.protocol.events import (
    Delta,
    RequestOpened,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    Waiting,
    WorkspaceChanged,
)
from agent_sdk.protocol.methods.conversation import ToolCall
from agent_sdk.protocol.results import Snapshot, Wait, WorkspaceInfo
from agent_sdk.remote.link import Linked
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.rpc.peer import Peer
from agent_sdk.tools import ToolResult
from agent_sdk.workspace.contract import Workspace
from agent_server.boxes.forwarding import ForwardedCalls
from agent_server.boxes.link import BoxLink
from agent_server.boxes.watch import STARTS
from agent_server.logs import Logs
from agent_server.metrics import Metrics
from agent_server.work import Work

CLOSE_GONE = 4404
CLOSE_FAILED = 1011
REASON_CHARACTERS = 100
_END, _START, _RESUMED = (
    b'{"type":"%b"' % str(kind.__struct_config__.tag).encode()
    for kind in (TurnEnded, TurnStarted, TurnResumed)
)
"""How the JSON of such an event begins: our own encoder wrote it, and it writes the tag first."""
BACK_SECONDS = 5.0
"""In which the clients of a server that was stopped may come back and stop a turn before it does anything new."""


class Client(Protocol):
    """A connection that is bound to the conversation."""

    @property
    def peer(self) -> Peer | None:
        """What calls come over."""
        ...

    def dismiss(self, code: int, reason: str) -> None:
        """Close it."""
        ...


class LoadedConversation:
    """One conversation while it is in this server's memory."""

    def __init__(
        self,
        id: str,
        log: EventLog,
        link: BoxLink,
        *,
        workspace: str,
        store: AgentStore,
        logs: Logs,
        metrics: Metrics,
        work: Work,
        awaited: int = 0,
    ) -> None:
        """Describe it; `awaited`: how many clients the last server let go of."""
        self.id = id
        self.link = link
        self._workspace = workspace
        self.forwarded = ForwardedCalls(id, link, log)
        self.tools = ClientTools()
        self.operations = IdempotencyStore(InMemory())
        self.connections: set[Client] = set()
        self.users = 0
        """Connections and requests that hold it in memory."""
        self.subscribers = 0
        """Connections that listen to its events."""
        self._awaited = awaited
        self._clients_back = asyncio.Event()
        self.local = LocalConversation(
            None,
            RemoteWorkspace.over(link),
            id=id,
            log=log,
            run_client_tool=self.tools.run,
            store=store,
            place=BoxPlace(link, self._clients_back),
        )
        self.local.on_turn_failed = self._turn_failed
        self._log = log
        self._logs = logs
        self._metrics = metrics
        self._work = work
        self._opened = False
        self._noting: set[asyncio.Task[None]] = set()
        self._turn: ExitStack | None = None
        """What is counted while a turn runs."""
        self._forget: list[Callable[[], None]] = []
        self._delta_listeners: dict[object, Callable[[bytes], None]] = {}

    def __repr__(self) -> str:
        return f"<LoadedConversation {self.id}, {self.users} users, {self.link!r}>"

    async def open(self) -> None:
        """Read the log; may be called again."""
        if not self._forget:  # before the log is read: a turn that is open in it goes on at once
            self._forget.append(self._logs.redactor.of(self.id, self.local.mask))
            self._forget.append(self.local.subscribe(self._follow_turns))
            self._forget.append(self.local.subscribe_deltas(self._pass_delta))
            self._forget.append(self.link.events.listen(self._changed))
            patience = BACK_SECONDS if self._awaited else 0.0
            back = asyncio.get_running_loop().call_later(patience, self._clients_back.set)
            self._forget.append(back.cancel)
        await self.local.__aenter__()
        if self.link.events.untold is not None:
            untold, self.link.events.untold = self.link.events.untold, None
            await self._note(untold)
        if not self._opened:
            self._opened = True
            await self.forwarded.open()

    async def close(self) -> None:
        """Let go of everything but the workspace, which may be shared. A turn that runs stays open in the log."""
        await self.forwarded.close()
        await self.operations.close(draining)
        await self.local.suspend()
        self._end_turn()
        left = self.local.left(self.link.instance)
        self.link.awaited = self.link.awaited or left == "written"
        self.link.owing = self.link.owing or (left == "begun" and not self.link.untouched)
        for forget in self._forget:
            forget()
        self._forget.clear()

    def subscribed(self) -> None:
        """One more listens, and has said by now what it could not say while there was no server."""
        self.subscribers += 1
        if self.subscribers >= self._awaited:
            self._clients_back.set()

    @property
    def busy(self) -> bool:
        """Whether something goes on in it that nobody needs to be connected for."""
        return self.local.working or bool(self.operations.under_way) or self.forwarded.busy

    @property
    def epoch(self) -> str:
        """Of its log."""
        return self.local.epoch

    @property
    def head_seq(self) -> int:
        """The seq of its last event."""
        return self.local.head_seq

    async def page(self, after: int, limit: int = PAGE_EVENTS) -> list[tuple[int, bytes]]:
        """Return at most `limit` events after a seq, as (seq, JSON); empty at the end of the log."""
        return await self._log.read(self.id, after, limit)

    async def state(self) -> Snapshot:
        """Return its present state."""
        operations = await self.forwarded.operations()
        return replace(await self.local.state(), operations=operations, workspace=self._workspace)

    def subscribe(self, listener: Callable[[int, bytes], None]) -> Callable[[], None]:
        """Call with every event from now on; return what ends it."""
        return self.local.subscribe(listener)

    def subscribe_deltas(self, listener: Callable[[bytes], None]) -> Callable[[], None]:
        """Call with every delta from now on, encoded once for all; return what ends it."""
        key = object()
        self._delta_listeners[key] = listener

        def stop() -> None:
            self._delta_listeners.pop(key, None)

        return stop

    def mask(self, secrets: Iterable[str | None]) -> None:
        """Keep these values out of all logs while the conversation is in memory."""
        self.local.mask.hide(secrets)

    def dismiss(self, code: int, reason: str, *, but: Peer | None = None) -> None:
        """Close its connections, `but` that one."""
        for client in list(self.connections):
            if but is None or client.peer is not but:
                client.dismiss(code, reason)

    async def wind_down(self) -> None:
        """The server stops: let go of the turn, as soon as the next server can go on with it; return then."""
        await self.local.wind_down()
        self._end_turn()

    def _follow_turns(self, seq: int, event: bytes) -> None:
        if self._turn is None and event.startswith((_START, _RESUMED)):
            self._begin_turn()
        elif event.startswith(_END):
            self._end_turn()

    def _turn_failed(self, failure: Exception) -> None:
        """The log took no end of the turn, so nobody hears of it there: let clients come back and see."""
        self._end_turn()
        self.dismiss(CLOSE_FAILED, str(failure)[:REASON_CHARACTERS])

    @contextmanager
    def turn_admitted(self) -> Iterator[None]:
        """Have a place among the server's turns for one that begins in the block, if none runs yet.

        Raises:
            Overloaded: there is no place; nothing has been written.
        """
        if self._turn is None:
            self._work.admit_turn()
            self._begin_turn()
        try:
            yield
        finally:
            if not self.local.working:
                self._end_turn()

    def _begin_turn(self) -> None:
        self._turn = ExitStack()
        self._turn.enter_context(self._work.turn())
        self._turn.enter_context(self._metrics.turns.track_inprogress())

    def _changed(self, event: WorkspaceChanged | Waiting) -> None:
        noting = asyncio.create_task(self._note(event))
        self._noting.add(noting)
        noting.add_done_callback(self._noting.discard)

    async def _note(self, event: WorkspaceChanged | Waiting) -> None:
        with suppress(AgentServerError):  # the conversation is being closed, or its log cannot be written
            await self.local.record(event)

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    def _pass_delta(self, delta: Delta) -> None:
        if self._delta_listeners:
            encoded = msgspec.json.encode(delta)
            for listener in list(self._delta_listeners.values()):
                listener(encoded)


class BoxPlace(Place):
    """The boxes of a workspace as the place where an agent's tools act."""

    def __init__(self, link: BoxLink, clients_back: asyncio.Event) -> None:
        """Take the boxes, and what is set when the clients are there again that the last server let go of."""
        self._link = link
        self._clients_back = clients_back

    @property
    def instance(self) -> str:
        return self._link.named()

    @property
    def waits(self) -> tuple[Wait, ...]:
        return (Wait(what="box", reason=STARTS),) if self._link.is_starting else ()

    async def describe(self, workspace: Workspace) -> WorkspaceInfo:
        return self._link.where or await workspace.describe()

    def untouched(self, instance: str) -> bool:
        return instance == self._link.instance and self._link.untouched

    def again(self, instance: str) -> RemoteWorkspace | None:
        return RemoteWorkspace.over(_Same(self._link, instance)) if instance == self._link.instance else None

    async def ready(self) -> None:
        """Return when something new may begin there: what clients asked for while there was no server comes first."""
        await self._clients_back.wait()


class _Same:
    """A link.Link to one box and no other."""

    def __init__(self, link: BoxLink, instance: str) -> None:
        self._link = link
        self._instance = instance

    async def linked(self) -> Linked:
        linked = await self._link.again(self._instance)
        if linked is None:
            raise OutcomeUnknown("the box in which it ran was lost; whether it was done is not known")
        return linked


class ClientTools:
    """The tools of one conversation that run in a client's process: which connection answers which, and what waits.

    A call is a durable request first (`request_opened` in the log), a `tool.call` over a socket second. It
    goes to the connection that registered the tool last; when a newer one registers it meanwhile, that
    one is asked, too, because the older may be a closed laptop that nobody has noticed yet. The first
    answer counts. With nobody to ask the call waits, for a week if need be.
    """

    def __init__(self) -> None:
        self._registered: dict[str, list[Peer]] = {}
        self._pending: dict[str, _Pending] = {}

    def register(self, peer: Peer, tools: Iterable[str]) -> None:
        """From now on this connection answers calls of these tools, those that wait included."""
        for tool in tools:
            peers = self._registered.setdefault(tool, [])
            if peer in peers:
                peers.remove(peer)
            peers.append(peer)
            for pending in self._pending.values():
                if pending.request.tool == tool:
                    pending.ask(peer)

    def forget(self, peer: Peer) -> None:
        """Forget a connection that is gone."""
        for tool, peers in list(self._registered.items()):
            if peer in peers:
                peers.remove(peer)
            if not peers:
                del self._registered[tool]

    async def run(self, request: RequestOpened) -> ToolResult:
        """Have a client run a call, and wait for it. Cancelling withdraws the call, unless its turn is left.

        What the client's code raises is an error result, not an exception.
        """
        pending = _Pending(request, self)
        self._pending[request.request_id] = pending
        try:
            pending.ask(self.newest(request.tool, set()))
            return await pending.result
        finally:
            del self._pending[request.request_id]
            pending.withdraw(left=is_left())

    def newest(self, tool: str, others: set[Peer]) -> Peer | None:
        """Return the connection that registered the tool last, other than these; None: there is none."""
        return next((peer for peer in reversed(self._registered.get(tool, [])) if peer not in others), None)


class _Pending:
    """One call that waits for its first answer."""

    def __init__(self, request: RequestOpened, tools: ClientTools) -> None:
        self.request = request
        self.result: asyncio.Future[ToolResult] = asyncio.get_running_loop().create_future()
        self._tools = tools
        self._asking: dict[Peer, asyncio.Task[None]] = {}
        self._left = False
        """Whether it goes on in the client, for the next server."""

    def ask(self, peer: Peer | None) -> None:
        if peer is not None and peer not in self._asking and not self.result.done():
            self._asking[peer] = asyncio.create_task(self._ask(peer))

    def withdraw(self, *, left: bool) -> None:
        self._left = left
        for task in self._asking.values():
            task.cancel()

    async def _ask(self, peer: Peer) -> None:
        request = self.request
        call = ToolCall(
            request_id=request.request_id,
            call_id=request.call_id,
            tool=request.tool,
            arguments=request.arguments,
        )
        try:
            output = await peer.call(call, leave=lambda: self._left)
        except (ConnectionLost, Cancelled):  # it is gone, or has closed its conversation
            self._tools.forget(peer)
            del self._asking[peer]
            if not self._asking:
                self.ask(self._tools.newest(request.tool, set()))
        except AgentServerError as exc:
            self._answer(ToolResult(text=f"{request.tool}: {exc}", is_error=True))
        else:
            self._answer(ToolResult(text=output.text, is_error=output.is_error, data=output.data))

    def _answer(self, result: ToolResult) -> None:
        if not self.result.done():
            self.result.set_result(result)
