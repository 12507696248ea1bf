"""Tools that run in a client's process: which connection answers which tool, and what waits for an answer.

A call is a durable request first (`request_opened` in the log), a `tool.call` over a socket second. It
goes to the connection that registered the tool last; when a newer one registers it meanwhile, that
one is asked, too, because the older may be a closed laptop that nobody has noticed yet. The first
answer counts. With nobody to ask the call waits, for a week if need be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from agent_sdk.agent.turn_state import is_left
from agent_sdk.protocol.errors import AgentServerError, Cancelled, ConnectionLost
from agent_sdk.protocol.events import RequestOpened
from agent_sdk.protocol.methods.conversation import ToolCall, ToolOutput
from agent_sdk.tools import ToolResult


class Asked(Protocol):
    """What of a Peer is needed here."""

    async def call(self, params: ToolCall, *, leave: Callable[[], bool]) -> ToolOutput:
        """Call a method of the client and wait for the answer, as Peer.call does."""
        ...


class ClientTools:
    """The client tools of one conversation."""

    def __init__(self) -> None:
        self._registered: dict[str, list[Asked]] = {}
        self._pending: dict[str, _Pending] = {}

    def register(self, peer: Asked, tools: Iterable[str]) -> None:
        """From now on this connection answers calls of these tools, those that wait included."""
        for tool in tools:
            peers = self._registered.setdefault(tool, [])
            if peer in peers:
                peers.remove(peer)
            peers.append(peer)
            for pending in self._pending.values():
                if pending.request.tool == tool:
                    pending.ask(peer)

    def forget(self, peer: Asked) -> None:
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

    def newest(self, tool: str, others: set[Asked]) -> Asked | None:
        """Return the connection that registered the tool last, other than these; None: there is none."""
        return next((peer for peer in reversed(self._registered.get(tool, [])) if peer not in others), None)


class _Pending:
    """One call that waits for its first answer."""

    def __init__(self, request: RequestOpened, tools: ClientTools) -> None:
        self.request = request
        self.result: asyncio.Future[ToolResult] = asyncio.get_running_loop().create_future()
        self._tools = tools
        self._asking: dict[Asked, asyncio.Task[None]] = {}
        self._left = False
        """Whether it goes on in the client, for the next server."""

    def ask(self, peer: Asked | None) -> None:
        if peer is not None and peer not in self._asking and not self.result.done():
            self._asking[peer] = asyncio.create_task(self._ask(peer))

    def withdraw(self, *, left: bool) -> None:
        self._left = left
        for task in self._asking.values():
            task.cancel()

    async def _ask(self, peer: Asked) -> None:
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
