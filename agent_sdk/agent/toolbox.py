"""The tools of one conversation: what the model is told of them, and running a call so that it always has a result.

Built-in tools are made by name. Those that act on nothing are here: `think`, `finish`, and `task_tracker`, a list of
tasks. There is one list in a conversation; it is replaced as a whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec
from msgspec import Meta, Struct

from agent_sdk.agent.mask import shortened
from agent_sdk.agent.tools.file_editor import FileEditorTool
from agent_sdk.agent.tools.terminal import TerminalTool
from agent_sdk.cancellation import is_cancelled
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    InvalidParams,
    OutcomeUnknown,
    ToolError,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.specs import ToolSpec
from agent_sdk.tools import (
    FunctionTool,
    Resumable,
    Tool,
    ToolContext,
    ToolResult,
    decode_arguments,
    failed,
    parameters_of,
)

logger = logging.getLogger("agent_sdk")

ARGUMENT_BYTES = 1 << 20

UNKNOWN = ToolResult(
    text="[no result: the process that ran it ended; whether and how far the call was carried out is unknown]",
    is_error=True,
    data={"outcome": "unknown"},
)


@runtime_checkable
class Remembering(Protocol):
    """A tool whose state is in its results."""

    def recall(self, data: dict[str, Any]) -> None:
        """Take up the state of the last result, after a restart."""
        ...


class Toolbox:
    """Tools by name, and the specs of those that run in a client.

    Raises:
        InvalidParams: two tools have the same name.
    """

    def __init__(self, tools: Iterable[Tool], client_tools: Iterable[ToolSpec] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        self.by_name: dict[str, ToolSpec] = {}
        """What the model is told of."""
        for tool in tools:
            self._add(tool.spec)
            self._tools[tool.spec.name] = tool
        for spec in client_tools:
            self._add(spec)
        self.specs: tuple[ToolSpec, ...] = tuple(self.by_name.values())

    def _add(self, spec: ToolSpec) -> None:
        if spec.name in self.by_name:
            raise InvalidParams(f"tools: there are two tools called {spec.name!r}; give one another name")
        self.by_name[spec.name] = spec

    def recall(self, results: Mapping[str, dict[str, Any]]) -> None:
        """Let tools that remember go on from the `data` of their last results, by tool."""
        for name, data in results.items():
            tool: object = self._tools.get(name)
            if isinstance(tool, Remembering):
                tool.recall(data)

    def runs_in_client(self, name: str) -> bool:
        """Whether calls of this tool are somebody else's to answer."""
        return name in self.by_name and name not in self._tools

    def refusal(self, name: str, arguments: str) -> ToolResult | None:
        """Return why a call cannot be run at all, in words for the model; None when it can."""
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none"
            return ToolResult(
                text=f"There is no tool {shortened(name, 64)!r}. The tools are: {known}.", is_error=True
            )
        if len(arguments) > ARGUMENT_BYTES:
            return ToolResult(
                text="The arguments are longer than 1 MiB; do it in smaller steps.", is_error=True
            )
        return None

    def repeatable(self, name: str) -> bool:
        """Whether a call of this tool does no harm when it is run again."""
        spec = self.by_name.get(name)
        return spec is not None and (spec.read_only or spec.idempotent)

    def may_be_left(self, name: str) -> bool:
        """Whether a call under way can be given up by this process and taken up by another."""
        return (
            self.runs_in_client(name) or self.repeatable(name) or isinstance(self._tools.get(name), Resumable)
        )

    async def run(
        self, name: str, arguments: str, context: ToolContext, *, begun: bool = False
    ) -> ToolResult:
        """Run a call; whatever goes wrong is a result that the model reads.

        Args:
            name: of the tool.
            arguments: as the model wrote them.
            context: what the tool may use.
            begun: another process may have begun it: it is taken up, or the result says that nobody knows.

        Raises:
            WorkspaceUnavailable, ConnectionLost: the place is gone, and with it the sense of going on.
        """
        tool = self._tools[name]
        try:
            if not begun or self.repeatable(name):
                return await tool.run(arguments, context)
            return await tool.resume(arguments, context) if isinstance(tool, Resumable) else UNKNOWN
        except OutcomeUnknown:
            return UNKNOWN
        except (WorkspaceUnavailable, ConnectionLost):
            raise
        except BaseException as exc:  # noqa: BLE001  part of the turn's boundary: no tool breaks the turn
            return failed_call(name, exc)

    async def abandon(self, name: str, arguments: str, context: ToolContext) -> None:
        """End what another process has begun of a call, if the place is still there and the tool knows how."""
        tool: object = self._tools.get(name)
        if isinstance(tool, Resumable) and context.same_place:
            try:
                await tool.abandon(arguments, context)
            except Exception as exc:  # noqa: BLE001  as above: the turn ends in any case
                failed_call(name, exc)


def failed_call(name: str, exc: BaseException) -> ToolResult:
    """Return the result of a call that raised: what the model reads instead.

    Raises:
        CancelledError: it was not the tool's, but meant for this task.
    """
    if isinstance(exc, AgentServerError):
        return ToolResult(text=str(exc), is_error=True, data={"error": exc.kind})
    if isinstance(exc, asyncio.CancelledError) and is_cancelled():
        raise exc
    logger.warning("tool %s failed", name, exc_info=exc)
    return failed(exc)


FINISH = "finish"
"""The loop ends the turn with the message of this tool."""


async def think(thought: Annotated[str, Meta(description="What you think.")]) -> str:
    """Write down a thought: weigh causes, options or a plan.

    Nothing happens and nothing is looked up; the thought stays in the conversation.
    """
    return "The thought is noted."


async def finish(
    message: Annotated[
        str, Meta(description="For the user: what was done, what was found, what is left open.")
    ],
) -> str:
    """Say that the task is done, or cannot be done, and end your turn. Call it last."""
    return message


_DESCRIPTION = """\
Keep a list of tasks for work of several steps, and show the user how far you are.

- plan: replaces the whole list by task_list.
- view: shows the list.

Keep one task in_progress at a time, and mark a task done as soon as it is."""

_MARKS = {"todo": "[ ]", "in_progress": "[>]", "done": "[x]"}


class Task(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry."""

    title: Annotated[str, Meta(min_length=1)]
    notes: str = ""
    status: Literal["todo", "in_progress", "done"] = "todo"


class TaskTrackerArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model may say."""

    command: Literal["view", "plan"]
    task_list: (
        Annotated[list[Task], Meta(max_length=1000, description="plan: all tasks, in order.")] | None
    ) = None


class TaskTrackerTool:
    """One per conversation."""

    def __init__(self) -> None:
        self.spec = ToolSpec(
            name="task_tracker",
            description=_DESCRIPTION,
            parameters=parameters_of(TaskTrackerArguments),
            read_only=True,
        )
        self._tasks: list[Task] = []

    def recall(self, data: dict[str, Any]) -> None:
        """Go on with the list of an earlier result's `data`; anything else is ignored."""
        try:
            self._tasks = msgspec.convert(data.get("tasks"), list[Task])
        except msgspec.ValidationError:
            self._tasks = []

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Keep or show the list of tasks, which is in `data`, too; raises as Tool.run says."""
        wanted: TaskTrackerArguments = decode_arguments(arguments, TaskTrackerArguments)
        if wanted.command == "plan":
            if wanted.task_list is None:
                raise ToolError("task_list: plan needs it; an empty list removes all tasks")
            self._tasks = wanted.task_list
        done = sum(task.status == "done" for task in self._tasks)
        lines = [f"{done} of {len(self._tasks)} tasks are done."] if self._tasks else ["There are no tasks."]
        for number, task in enumerate(self._tasks, 1):
            lines.append(f"{number}. {_MARKS[task.status]} {task.title}")
            lines += [f"   {line}" for line in task.notes.splitlines()]
        return ToolResult(text="\n".join(lines), data={"tasks": msgspec.to_builtins(self._tasks)})


_BUILT_IN: dict[str, Callable[[str], Tool]] = {
    "terminal": TerminalTool,
    "file_editor": lambda conversation: FileEditorTool(),
    "task_tracker": lambda conversation: TaskTrackerTool(),
    "think": lambda conversation: FunctionTool(think, read_only=True),
    FINISH: lambda conversation: FunctionTool(finish, name=FINISH, read_only=True),
}


def make_tool(name: str, conversation: str) -> Tool:
    """Return a fresh built-in tool for this conversation.

    Raises:
        InvalidParams: there is none of this name.
    """
    if name not in _BUILT_IN:
        raise InvalidParams(
            f"tools: there is no built-in tool {name[:64]!r}; there are {', '.join(_BUILT_IN)}"
        )
    return _BUILT_IN[name](conversation)
