"""The contract of a middleware: a feature of the agent, which the loop calls at the points of a turn."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from agent_sdk.models import Completion, ModelClient, ModelRequest
from agent_sdk.protocol.checks import Checked, checked
from agent_sdk.protocol.events import Event, RunStatus, ToolCalled
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import ConfirmationPolicy, Model, ToolSpec
from agent_sdk.tools import Tool, ToolResult
from agent_sdk.workspace.contract import Workspace

RunTool = Callable[[ToolCalled], Awaitable[ToolResult]]
"""Runs a call, or what a middleware has made of it: the middleware after this one, in the end the tool."""


class Stop(Exception):
    """Raise it at a point of a turn to end the turn. Calls that have no result yet are given the reason as theirs."""

    @checked
    def __init__(
        self,
        reason: str,
        *,
        status: Literal["limit", "paused", "finished"] = "limit",
        final_text: str = "",
    ) -> None:
        """Say why.

        Args:
            reason: a sentence for the user.
            status: how the turn ends. After `limit` and `paused` the next `run` goes on with the work.
            final_text: what `run` returns as the answer.
        """
        super().__init__(reason)
        self.reason = reason
        self.status: RunStatus = status
        self.final_text = final_text


class Section(Checked, frozen=True):
    """A part of the system prompt."""

    name: str
    text: str


class ModelCall(ModelRequest, frozen=True, kw_only=True):
    """A request before it is sent, and who answers it."""

    llm: Model
    """The model, as `ModelUsed` names it."""
    client: ModelClient
    """The way to it: another one, or one that asks this one and does something before or after."""


class TurnContext(Struct, frozen=True, kw_only=True):
    """What a middleware may know of the turn that runs, and do in it."""

    run_id: str
    workspace: Workspace
    """Where the agent's tools act."""
    tools: Mapping[str, ToolSpec]
    """All tools of the agent, by name."""
    model_calls: int
    """How many the turn has made, in whatever process."""
    max_model_calls: int
    """How many it may make: the conversation's `max_iterations`."""
    confirmation: ConfirmationPolicy
    """The conversation's policy as it is now."""
    describe: Callable[[], Awaitable[WorkspaceInfo]]
    """Returns what is known of the workspace, without starting anything."""
    hide: Callable[[Any], Any]
    """Returns text, or data that is JSON, with `<secret-hidden>` for every secret."""
    append: Callable[[Event], Awaitable[None]]
    """Writes an event to the log and returns when it is there. A UserMessage is read at the next model call, and the
    turn does not end before that. Events by which turns, calls and requests begin and end are the loop's to write."""
    state: Any = None
    """What `reduce` has made of the log up to now; of this middleware alone."""


def _kind(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.rpartition(".")[2]).lower()


class Middleware(Checked, frozen=True, kw_only=True, tag_field="kind", tag=_kind, forbid_unknown_fields=True):
    """A feature of an agent: its options as fields, and what happens at the points it overrides.

    It is frozen data that JSON can say. One object may be in several agents and conversations, and another one may be
    made of it after a restart: what a conversation has come to is in `TurnContext.state`. Its kind is the name of its
    class as words (`CallLimit` is `call_limit`). Servers know it by that: a class of a user has to be installed there.

    Points are awaited in the task of the turn. An interrupt cancels them: let CancelledError pass. Stop ends the turn.
    An AgentServerError fails the turn as it is, anything else as MiddlewareFailed, which names the middleware.
    """

    def tools(self) -> Sequence[Tool]:
        """Return the tools that come with the feature, fresh ones for each conversation."""
        return ()

    def reduce(self, state: Any, event: Event) -> Any:
        """Return the state after the next event of the log; None is the state before the first.

        Called for every event in order, also for those that were written before this process: what follows from them
        survives any crash. Change nothing but what is returned; it may be the same object, changed.
        """
        return state

    async def on_turn_start(self, turn: TurnContext) -> None:
        """Do what comes before the first model call of a turn.

        Called once more where a process ended before that call was answered.
        """

    async def prompt(self, turn: TurnContext, sections: tuple[Section, ...]) -> tuple[Section, ...]:
        """Return the sections of the system prompt, once in a turn and in each process that runs it.

        Providers keep in their caches what does not change between requests: put first what never does.
        """
        return sections

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        """Return the request that is sent: this one, or another (`msgspec.structs.replace`).

        `request.turns` is the history. Leave the list as it is; a result always follows its call. To see answers and
        failures before the loop does, replace `request.client` by a ModelClient that asks it.
        """
        return request

    async def after_model(self, turn: TurnContext, answer: Completion) -> Completion:
        """Return the answer that is written to the log and acted upon: this one, or another.

        A ToolUse with `ask=True` waits for an approval before it runs, also over restarts.
        """
        return answer

    async def around_tool(self, turn: TurnContext, call: ToolCalled, run: RunTool) -> ToolResult:
        """Run a call and return its result: that of `run(call)`, or another one, with or without running it.

        Called beside others of its kind where tools only read. Called again in the next process for a call that has no
        result yet; `run` then never carries it out twice.
        """
        return await run(call)

    async def on_turn_end(self, turn: TurnContext, status: RunStatus) -> None:
        """Do what comes before the end of a turn is written.

        Called when it ends by itself, `finished`, `paused` or `limit`; not when it fails or is interrupted, which
        `on_event` learns as TurnEnded. Called again if a message, from here or elsewhere, makes the turn go on.
        """

    async def on_event(self, event: Event) -> None:
        """Observe an event that was written just now, in order, beside the turn. What it raises is logged, no more."""
