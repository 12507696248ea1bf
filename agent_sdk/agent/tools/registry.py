"""The built-in tools by name, and those two of them that only speak: `think` and `finish`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from agent_sdk.agent.tools.file_editor import FileEditorTool
from agent_sdk.agent.tools.task_tracker import TaskTrackerTool
from agent_sdk.agent.tools.terminal import TerminalTool
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.tools import FunctionTool, Tool

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
