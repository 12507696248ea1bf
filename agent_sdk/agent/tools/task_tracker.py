"""task_tracker: the agent's list of what is to be done. One list per conversation, replaced as a whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from agent_sdk.protocol.errors import ToolError
from agent_sdk.protocol.specs import ToolSpec
from agent_sdk.tools import ToolContext, ToolResult, decode_arguments, parameters_of

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
