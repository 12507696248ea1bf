"""Which calls wait for somebody's approval: what the conversation's ConfirmationPolicy says."""

from __future__ import annotations

from msgspec.structs import replace

from agent_sdk.middleware import Middleware, TurnContext
from agent_sdk.models import Completion
from agent_sdk.protocol.specs import ConfirmationPolicy, ToolSpec

HARMLESS = frozenset({"think", "finish"})
"""Only speak; asking for approval of them would teach people to approve without reading."""


class Approval(Middleware, frozen=True):
    """Asks for approval of the calls that the policy names."""

    async def after_model(self, turn: TurnContext, answer: Completion) -> Completion:
        policy, tools = turn.confirmation, turn.tools
        uses = tuple(
            replace(use, ask=True) if use.tool in tools and needs_approval(policy, tools[use.tool]) else use
            for use in answer.tool_calls
        )
        return answer if uses == answer.tool_calls else replace(answer, tool_calls=uses)


def needs_approval(policy: ConfirmationPolicy, tool: ToolSpec) -> bool:
    """Whether a call of this tool waits for an answer."""
    if tool.name in policy.tools:
        return True
    if tool.name in HARMLESS:
        return False
    return policy.mode == "always" or (policy.mode == "writes" and not tool.read_only)
