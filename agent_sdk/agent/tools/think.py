"""think: room for the model to reason in writing, without any effect."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from agent_sdk.tools import FunctionTool


async def think(thought: Annotated[str, Meta(description="What you think.")]) -> str:
    """Write down a thought: weigh causes, options or a plan.

    Nothing happens and nothing is looked up; the thought stays in the conversation.
    """
    return "The thought is noted."


def think_tool() -> FunctionTool[..., Any]:
    """Return the tool."""
    return FunctionTool(think, read_only=True)
