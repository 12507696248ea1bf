"""Running the tool calls of a turn: in order, approved where that is asked for, each with exactly one result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from agent_sdk.agent.actor import Actor
from agent_sdk.agent.clip import clip_result
from agent_sdk.agent.journal import Journal
from agent_sdk.agent.toolbox import failed
from agent_sdk.agent.tools.finish import FINISH
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import RequestNotFound
from agent_sdk.protocol.events import Event, RequestOpened, RequestResolved, ToolCalled, ToolReturned
from agent_sdk.tools import ToolResult

CALLS_PER_ANSWER = 64


class _Decision(NamedTuple):
    approved: bool
    reason: str
    written: Awaitable[Any]
    """Done when the answer is in the log."""


class Calls:
    """The calls of one turn."""

    def __init__(self, actor: Actor, journal: Journal) -> None:
        self.stopped = False
        """The turn was interrupted; a tool that swallows its cancellation must not let it go on."""
        self._actor = actor
        self._journal = journal
        self._results: dict[str, ToolResult] = {}
        """Of calls whose ToolReturned is not written yet."""
        self._approvals: dict[str, asyncio.Future[_Decision]] = {}
        self._deciding: dict[str, asyncio.Future[_Decision]] = {}
        """Like `_approvals`, but an answer does not take them out."""
        self._client_requests: set[str] = set()

    async def run(self, calls: Sequence[ToolCalled]) -> str | None:
        """Run the calls of one answer, neighbours that only read together; return what `finish` said.

        Results are written in the order of the calls. Cancelling cancels the tools under way.

        Raises:
            WorkspaceUnavailable, ConnectionLost: the place where tools act is gone.
        """
        for call in calls[CALLS_PER_ANSWER:]:
            text = f"Not run: at most {CALLS_PER_ANSWER} calls fit into one answer."
            self._results[call.call_id] = ToolResult(text=text, is_error=True)
        approvals = await self._ask([call for call in calls if self._waits(call)])
        final = None
        for group in self._groups(calls, approvals):
            await self._run_group(group, approvals)
            for call in group:
                result = self._results[call.call_id]
                if call.tool == FINISH and not result.is_error:
                    final = result.text
            await self._journal.append(*(self._returned(call) for call in group))
            if self.stopped:
                raise asyncio.CancelledError
        return final

    async def respond(self, request_id: str, answer: Literal["approve", "reject"], reason: str) -> None:
        """Answer an approval; returns when the answer is in the log.

        Raises:
            RequestNotFound: nothing with this id waits.
        """
        waiting = self._approvals.pop(request_id, None)
        if waiting is None:
            raise RequestNotFound(f"no request {request_id[:64]!r} waits for an answer", request=request_id)
        approved = answer == "approve"
        written = self._journal.submit(
            RequestResolved(
                request_id=request_id, answer="approved" if approved else "rejected", reason=reason
            )
        )
        waiting.set_result(_Decision(approved, reason, written))
        await asyncio.shield(written)

    def close(self, why: str) -> list[Event]:
        """Return the events that void open requests and give every open call its result, or `why` there is none."""
        open_requests = [*self._approvals, *self._client_requests]
        self._approvals.clear()
        self._client_requests.clear()
        for call in self._journal.history.open_calls.values():
            self._results.setdefault(call.call_id, ToolResult(text=why, is_error=True))
        return [
            *(RequestResolved(request_id=request_id, answer="void") for request_id in open_requests),
            *(self._returned(call) for call in self._journal.history.open_calls.values()),
        ]

    # --- one by one ---

    async def _run_group(self, group: Sequence[ToolCalled], approvals: dict[str, str]) -> None:
        if len(group) == 1:
            await self._run_call(group[0], approvals.get(group[0].call_id))
            return
        tasks = [asyncio.create_task(self._run_call(call, None)) for call in group]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_call(self, call: ToolCalled, request_id: str | None) -> None:
        """Put the call's result into `_results`."""
        toolbox = self._actor.toolbox
        result = self._results.get(call.call_id) or toolbox.refusal(call.tool, call.arguments)
        if result is None and request_id is not None:
            result = await self._refused(request_id)
        if result is None and toolbox.runs_in_client(call.tool):
            result = await self._run_in_client(call)
        if result is None:
            result = await toolbox.run(call.tool, call.arguments, self._actor.context())
        self._results[call.call_id] = result

    async def _run_in_client(self, call: ToolCalled) -> ToolResult:
        runner = self._actor.run_client_tool
        if runner is None:
            text = f"{call.tool} runs in a client's process, and there is no client."
            return ToolResult(text=text, is_error=True)
        opened = _request(call, "client_tool")
        self._client_requests.add(opened.request_id)
        await self._journal.append(opened)
        try:
            result = await runner(opened)
        except Exception as exc:  # noqa: BLE001  part of the turn's boundary, like Toolbox.run
            result = failed(call.tool, exc)
        self._client_requests.discard(opened.request_id)
        await self._journal.append(RequestResolved(request_id=opened.request_id, answer="answered"))
        return result

    # --- approvals ---

    def _waits(self, call: ToolCalled) -> bool:
        known = self._actor.toolbox.refusal(call.tool, call.arguments) is None
        return known and call.call_id not in self._results and self._actor.needs_approval(call.tool)

    async def _ask(self, calls: Sequence[ToolCalled]) -> dict[str, str]:
        """Open a request for each call, all at once; return the request ids by call id."""
        requests = [_request(call, "approval") for call in calls]
        for request in requests:
            self._approvals[request.request_id] = asyncio.get_running_loop().create_future()
        self._deciding = {request.request_id: self._approvals[request.request_id] for request in requests}
        if requests:
            await self._journal.append(*requests)
        return {request.call_id: request.request_id for request in requests}

    async def _refused(self, request_id: str) -> ToolResult | None:
        """Wait for the answer; None means: go on."""
        decision = await self._deciding[request_id]
        await asyncio.shield(decision.written)
        if decision.approved:
            return None
        reason = f": {decision.reason}" if decision.reason else ", without a reason"
        return ToolResult(text=f"The user rejected this call{reason}. It was not run.", is_error=True)

    # --- order and form ---

    def _groups(self, calls: Sequence[ToolCalled], approvals: dict[str, str]) -> Iterator[list[ToolCalled]]:
        """Cut the calls, in order, into those that run together."""
        group: list[ToolCalled] = []
        for call in calls:
            alone = call.call_id in approvals or not self._actor.reads_only(call.tool)
            if group and alone:
                yield group
                group = []
            group.append(call)
            if alone:
                yield group
                group = []
        if group:
            yield group

    def _returned(self, call: ToolCalled) -> ToolReturned:
        result = self._results.pop(call.call_id)
        mask = self._actor.mask
        text, cut = clip_result(mask.text(result.text))
        return ToolReturned(
            call_id=call.call_id,
            tool=call.tool,
            text=text,
            is_error=result.is_error,
            data=_json_able(mask.data(result.data)),
            bytes_cut=cut,
        )


def _request(call: ToolCalled, kind: Literal["approval", "client_tool"]) -> RequestOpened:
    return RequestOpened(
        request_id=new_id(), call_id=call.call_id, request=kind, tool=call.tool, arguments=call.arguments
    )


def _json_able(data: dict[str, Any]) -> dict[str, Any]:
    """The data as it is, or as text when a tool returned what JSON cannot say."""
    try:
        msgspec.json.encode(data)
    except (TypeError, ValueError, RecursionError, OverflowError):
        return {"repr": repr(data)[:1000].encode(errors="replace").decode()}
    return data
