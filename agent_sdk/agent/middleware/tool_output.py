"""How much of a tool's result goes into the log."""

from __future__ import annotations

from msgspec.structs import replace

from agent_sdk.agent.clip import RESULT_BYTES, clip_result
from agent_sdk.middleware import Middleware, RunTool, TurnContext
from agent_sdk.protocol.events import ToolCalled
from agent_sdk.tools import ToolResult


class ToolOutput(Middleware, frozen=True):
    """Cuts long results in their middle."""

    async def around_tool(self, turn: TurnContext, call: ToolCalled, run: RunTool) -> ToolResult:
        result = await run(call)
        text = result.text
        # All that is written is masked there, but what may be cut is masked before.
        if len(text) > RESULT_BYTES // 8:
            text = turn.hide(text)
        text, cut = clip_result(text)
        return result if text == result.text else replace(result, text=text, bytes_cut=result.bytes_cut + cut)
