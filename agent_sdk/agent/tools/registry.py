"""The built-in tools by name, and those that act on nothing: `think`, `finish`, and `task_tracker`, a list of tasks.

There is one list in a conversation; it is replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from agent_sdk.agent.tools.file_editor import FileEditorTool
from agent_sdk.agent.tools.terminal import TerminalTool
from agent_sdk.protocol.errors import InvalidParams, ToolError
from agent_sdk.protocol.specs import ToolSpec
from agent_sdk.tools import FunctionTool, Tool, ToolContext, ToolResult, decode_arguments, parameters_of

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
