"""Which calls wait for somebody."""

from __future__ import annotations

from agent_sdk.protocol.specs import ConfirmationPolicy, ToolSpec

HARMLESS = frozenset({"think", "finish"})
"""Only speak; asking for approval of them would teach people to approve without reading."""


def needs_approval(policy: ConfirmationPolicy, tool: ToolSpec) -> bool:
    """Whether a call of this tool waits for an answer."""
    if tool.name in policy.tools:
        return True
    if tool.name in HARMLESS:
        return False
    return policy.mode == "always" or (policy.mode == "writes" and not tool.read_only)
