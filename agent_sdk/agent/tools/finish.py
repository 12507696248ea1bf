"""finish: the model says that it is done; the loop ends the turn with its message."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from agent_sdk.tools import FunctionTool

FINISH = "finish"


async def finish(
    message: Annotated[
        str, Meta(description="For the user: what was done, what was found, what is left open.")
    ],
) -> str:
    """Say that the task is done, or cannot be done, and end your turn. Call it last."""
    return message


def finish_tool() -> FunctionTool[..., Any]:
    """Return the tool; the text of its result is the message."""
    return FunctionTool(finish, name=FINISH, read_only=True)
