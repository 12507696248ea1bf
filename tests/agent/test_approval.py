"""Which calls wait for somebody."""

import pytest

from agent_sdk.agent.middleware.approval import needs_approval
from agent_sdk.protocol.specs import ConfirmationPolicy, ToolSpec


def spec(name: str, *, read_only: bool = False) -> ToolSpec:
    return ToolSpec(name=name, description="", parameters={}, read_only=read_only)


@pytest.mark.parametrize(
    ("mode", "waiting"),
    [("never", set()), ("writes", {"terminal"}), ("always", {"terminal", "look"})],
)
def test_the_mode_decides(mode, waiting):
    tools = [spec("terminal"), spec("look", read_only=True), spec("think"), spec("finish")]
    policy = ConfirmationPolicy(mode=mode)
    assert {tool.name for tool in tools if needs_approval(policy, tool)} == waiting


def test_a_tool_that_is_named_waits_whatever_the_mode_is():
    assert needs_approval(ConfirmationPolicy(tools=("finish",)), spec("finish"))
