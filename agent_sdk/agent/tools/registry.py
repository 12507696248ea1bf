"""The built-in tools by name."""

from __future__ import annotations

from collections.abc import Callable

from agent_sdk.agent.tools.file_editor import FileEditorTool
from agent_sdk.agent.tools.finish import finish_tool
from agent_sdk.agent.tools.task_tracker import TaskTrackerTool
from agent_sdk.agent.tools.terminal import TerminalTool
from agent_sdk.agent.tools.think import think_tool
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.tools import Tool

_BUILT_IN: dict[str, Callable[[str], Tool]] = {
    "terminal": TerminalTool,
    "file_editor": lambda conversation: FileEditorTool(),
    "task_tracker": lambda conversation: TaskTrackerTool(),
    "think": lambda conversation: think_tool(),
    "finish": lambda conversation: finish_tool(),
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
