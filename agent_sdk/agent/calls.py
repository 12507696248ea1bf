"""Running the tool calls of a turn: in order, approved where that is asked for, each with exactly one result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from agent_sdk.agent.history import CUT_CALL
from agent_sdk.agent.mask import HIDDEN
from agent_sdk.agent.runtime import AgentRuntime
from agent_sdk.agent.toolbox import FINISH, UNKNOWN, failed_call
from agent_sdk.agent.turn_state import Course, TurnLog
from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.ids import new_id, sha256
from agent_sdk.middleware import TurnContext
from agent_sdk.models import CUT, Completion
from agent_sdk.protocol.errors import RequestNotFound
from agent_sdk.protocol.events import Event, RequestOpened, RequestResolved, ToolCalled, ToolReturned
from agent_sdk.tools import ToolResult, as_utf8, is_json_object

CALLS_PER_ANSWER = 64
NOT_KEPT = (
    "Not run: its arguments held a secret, which the log does not keep, and the process that knew it has ended. "
    "Call it again."
)


class _Decision(NamedTuple):
    approved: bool
    reason: str
    written: Awaitable[Any] | None
    """Done when the answer is in the log; None: it was there before."""


class Calls:
    """The calls of one turn, one answer after the other."""

    def __init__(self, log: TurnLog, course: Course, turn: Callable[[], TurnContext]) -> None:
        self.runtime: AgentRuntime
        """Who runs them; set before all but `adopt`, `respond` and `close`."""
        self._log = log
        self._course = course
        self._turn = turn
        """Returns what middleware may know of it."""
        self._results: dict[str, ToolResult] = {}
        """Of calls whose ToolReturned is not written yet."""
        self._resolved: dict[str, RequestResolved] = {}
        """What is to be written beside the ToolReturned, by call id."""
        self._deciding: dict[str, asyncio.Future[_Decision]] = {}
        """By call id."""
        self._approvals: dict[str, asyncio.Future[_Decision]] = {}
        """Those of them that nobody has answered, by request id."""
        self._client_requests: dict[str, RequestOpened] = {}
        """By call id."""
        self._unanswered: frozenset[str] = frozenset()
        """Calls whose approval nobody had answered when they were taken up."""
        self._arguments: dict[str, str] = {}
        """By call id, as the model wrote them: the log has them without secrets."""
        self._begun: frozenset[str] = frozenset()
        """Calls that another process may have begun."""
        self._under_way: frozenset[str] = frozenset()
        """Calls that have begun here, and whose results are not written yet."""
        self._before = 0
        """How many calls of the same answer have their result already."""

    @property
    def begun(self) -> bool:
        """Whether one of the calls without a result may have begun where tools act."""
        return any(call_id in self._begun | self._under_way for call_id in self._log.turn.open_calls)

    def open(self, run_id: str, answer: Completion) -> tuple[list[ToolCalled], list[RequestOpened]]:
        """Begin with the calls of an answer; return them, and the requests to be written with them."""
        self._deciding, self._begun, self._before, self._arguments = {}, frozenset(), 0, {}
        uses = () if answer.finish_reason in ("refused", "filtered") else answer.tool_calls
        if not uses:
            return [], []
        runtime, limited = self.runtime, answer.finish_reason in CUT
        mask, tools = self._log.mask, runtime.toolbox
        calls = [
            ToolCalled(
                run_id=run_id,
                call_id=self._log.history.fresh_call_id(mask.text(as_utf8(use.call_id))),
                # A name that the model made up is its text like any other.
                tool=use.tool if use.tool in tools.by_name else mask.text(as_utf8(use.tool)),
                arguments=as_utf8(use.arguments),
                cut=limited and not is_json_object(use.arguments),
                place=runtime.place.instance,
            )
            for use in uses
        ]
        self._arguments = {call.call_id: call.arguments for call in calls}
        requests = [
            _request(call, "approval")
            for call, use in zip(calls[:CALLS_PER_ANSWER], uses, strict=False)
            if use.ask and self._refusal(call) is None
        ]
        for request in requests:
            self._expect(request)
        return calls, requests

    def refuse(self, calls: Sequence[ToolCalled], why: str) -> list[Event]:
        """Return the results of calls that a middleware has stopped: written with them, so that nobody runs them."""
        self._approvals.clear()
        self._deciding = {}
        self._results.update({call.call_id: ToolResult(text=why, is_error=True) for call in calls})
        return self._outcome(calls)

    def adopt(self) -> None:
        """Go on with the requests of the last answer that another process has opened."""
        state = self._log.turn
        for request in state.requests.values():
            answer = state.answers.get(request.request_id)
            if request.request == "approval":
                self._expect(request, answer)
            elif answer is None:
                self._client_requests[request.call_id] = request
        # Noted now: an answer may come before the calls are run.
        self._unanswered = frozenset(
            call_id for call_id, decision in self._deciding.items() if not decision.done()
        )
        self._begun = frozenset(self._log.turn.open_calls) - self._unanswered

    async def resume(self) -> str | None:
        """Like `run`, for calls that another process may have begun; `adopt` came before.

        Only the first group can have begun: a group starts when the results of the one before are written.
        """
        calls = list(self._log.turn.open_calls.values())
        self._before = self._log.turn.calls - len(calls)
        first = next(self._groups(calls), [])
        place = self.runtime.place
        begun = {call.call_id for call in first if not place.untouched(call.place)}
        self._begun = frozenset(begun) - self._unanswered
        return await self.run() or self._log.turn.concluded

    async def abandon(self) -> None:
        """End what another process has begun of the calls, where it still runs: nobody goes on with them."""
        runtime = self.runtime
        for call in self._log.turn.open_calls.values():
            if call.call_id in self._begun and not runtime.place.untouched(call.place):
                context = runtime.context(_key(call), call.place)
                await runtime.toolbox.abandon(call.tool, call.arguments, context)

    async def run(self) -> str | None:
        """Run the open calls, neighbours that only read together; return what `finish` said.

        Results are written in the order of the calls. Cancelling cancels the tools under way.

        Raises:
            WorkspaceUnavailable, ConnectionLost: the place where tools act is gone.
        """
        calls = list(self._log.turn.open_calls.values())
        for call in calls[max(0, CALLS_PER_ANSWER - self._before) :]:
            text = f"Not run: at most {CALLS_PER_ANSWER} calls fit into one answer."
            self._results[call.call_id] = ToolResult(text=text, is_error=True)
        final = None
        self._course.check()
        for group in self._groups(calls):
            await self._refuse(group)
            if any(call.call_id not in self._begun for call in group):
                await self.runtime.place.ready()
            self._course.check()
            self._under_way = frozenset(call.call_id for call in group if self._acts_here(call))
            toolbox = self.runtime.toolbox
            with self._course.finishing(not all(toolbox.may_be_left(call.tool) for call in group)):
                await (self._run_call(group[0]) if len(group) == 1 else self._run_together(group))
                for call in group:
                    result = self._results[call.call_id]
                    if call.tool == FINISH and not result.is_error:
                        final = result.text
                await self._log.append(*self._outcome(group))
            self._course.check()  # a tool that swallows its cancellation must not let the turn go on
        return final

    async def respond(
        self, request_id: str, answer: Literal["approve", "reject"], reason: str, op: Any = None
    ) -> None:
        """Answer an approval; returns when the answer is in the log.

        Raises:
            RequestNotFound: nothing with this id waits.
        """
        waiting = self._approvals.pop(request_id, None)
        if waiting is None:
            raise RequestNotFound(f"no request {request_id[:64]!r} waits for an answer", request=request_id)
        approved = answer == "approve"
        resolved = RequestResolved(
            request_id=request_id, answer="approved" if approved else "rejected", reason=reason
        )
        written = self._log.submit(resolved, op=op)
        if not waiting.done():  # else the turn was let go of, and another process goes on with the answer
            waiting.set_result(_Decision(approved, reason, written))
        await asyncio.shield(written)

    def close(self, why: str) -> list[Event]:
        """Return the events that void open requests and give every open call its result, or `why` there is none."""
        clients = (request.request_id for request in self._client_requests.values())
        open_requests = [*self._approvals, *clients]
        self._approvals.clear()
        self._client_requests.clear()
        calls = list(self._log.turn.open_calls.values())
        for call in calls:
            self._results.setdefault(call.call_id, ToolResult(text=why, is_error=True))
        return [
            *(RequestResolved(request_id=request_id, answer="void") for request_id in open_requests),
            *self._outcome(calls),
        ]

    # --- one by one ---

    async def _run_together(self, group: Sequence[ToolCalled]) -> None:
        tasks = [asyncio.create_task(self._run_call(call)) for call in group]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel_and_wait(*tasks)

    async def _run_call(self, call: ToolCalled) -> None:
        """Put the call's result into `_results`."""
        result = self._results.get(call.call_id) or self._refusal(call)
        if result is None:
            real = replace(call, arguments=self._arguments.get(call.call_id, call.arguments))
            result = await self.runtime.chain.around_tool(self._turn(), real, self._carry_out)
        self._results[call.call_id] = result

    async def _carry_out(self, call: ToolCalled) -> ToolResult:
        self._course.check(may_leave=False)
        runtime = self.runtime
        if refusal := runtime.toolbox.refusal(call.tool, call.arguments):  # a middleware may have changed it
            return refusal
        if runtime.toolbox.runs_in_client(call.tool):
            return await self._run_in_client(call)
        begun = call.call_id in self._begun
        context = runtime.context(_key(call), call.place if begun else None)
        return await runtime.toolbox.run(call.tool, call.arguments, context, begun=begun)

    async def _run_in_client(self, call: ToolCalled) -> ToolResult:
        runner = self.runtime.run_client_tool
        if runner is None:
            text = f"{call.tool} runs in a client's process, and there is no client."
            return ToolResult(text=text, is_error=True)
        opened = self._client_requests.get(call.call_id)
        if opened is None:
            opened = self._client_requests[call.call_id] = _request(call, "client_tool")
            await self._log.append(opened)
        try:
            result = await runner(replace(opened, arguments=call.arguments))
        except BaseException as exc:  # noqa: BLE001  part of the turn's boundary, like Toolbox.run
            result = failed_call(call.tool, exc)
        del self._client_requests[call.call_id]
        # Written with the result: a request that is answered in the log has its answer there, too.
        self._resolved[call.call_id] = RequestResolved(request_id=opened.request_id, answer="answered")
        return result

    def _refusal(self, call: ToolCalled) -> ToolResult | None:
        if call.cut:
            return ToolResult(text=CUT_CALL, is_error=True)
        if call.call_id not in self._arguments and HIDDEN in call.arguments:
            return UNKNOWN if call.call_id in self._begun else ToolResult(text=NOT_KEPT, is_error=True)
        return self.runtime.toolbox.refusal(call.tool, call.arguments)

    def _acts_here(self, call: ToolCalled) -> bool:
        """Whether it begins in the place of the conversation: neither in a client, nor with its result at hand."""
        return call.call_id not in self._results and not self.runtime.toolbox.runs_in_client(call.tool)

    # --- approvals ---

    def _expect(self, request: RequestOpened, answer: RequestResolved | None = None) -> None:
        decision: asyncio.Future[_Decision] = asyncio.get_running_loop().create_future()
        self._deciding[request.call_id] = decision
        if answer is None:
            self._approvals[request.request_id] = decision
        else:
            decision.set_result(_Decision(answer.answer == "approved", answer.reason, None))

    async def _refuse(self, group: Sequence[ToolCalled]) -> None:
        """Wait for the answer about the call that the group consists of; refused, it has its result."""
        call = group[0]
        if call.call_id not in self._deciding or call.call_id in self._results:
            return
        # Shielded: an answer may still come when the turn is let go of.
        decision = await asyncio.shield(self._deciding[call.call_id])
        if decision.written is not None:
            await asyncio.shield(decision.written)
        if not decision.approved:
            reason = f": {decision.reason}" if decision.reason else ", without a reason"
            text = f"The user rejected this call{reason}. It was not run."
            self._results[call.call_id] = ToolResult(text=text, is_error=True)

    # --- order and form ---

    def _groups(self, calls: Sequence[ToolCalled]) -> Iterator[list[ToolCalled]]:
        """Cut the calls, in order, into those that run together."""
        group: list[ToolCalled] = []
        for call in calls:
            spec = self.runtime.toolbox.by_name.get(call.tool)
            alone = call.call_id in self._deciding or spec is None or not spec.read_only
            if group and alone:
                yield group
                group = []
            group.append(call)
            if alone:
                yield group
                group = []
        if group:
            yield group

    def _outcome(self, calls: Sequence[ToolCalled]) -> list[Event]:
        resolved = [self._resolved.pop(call.call_id) for call in calls if call.call_id in self._resolved]
        returned = [
            ToolReturned(
                call_id=call.call_id,
                tool=call.tool,
                text=result.text,
                is_error=result.is_error,
                data=result.data,
                bytes_cut=result.bytes_cut,
            )
            for call in calls
            for result in [self._results.pop(call.call_id)]
        ]
        return [*resolved, *returned]


def _key(call: ToolCalled) -> str:
    """What tells a call from all others, also from one of the same id in a log whose damaged end was cut off."""
    digest = sha256()
    digest.update(f"{call.run_id}\0{call.call_id}\0{call.seq}\0{call.at!r}".encode())
    return digest.hexdigest()


def _request(call: ToolCalled, kind: Literal["approval", "client_tool"]) -> RequestOpened:
    return RequestOpened(
        request_id=new_id(), call_id=call.call_id, request=kind, tool=call.tool, arguments=call.arguments
    )
