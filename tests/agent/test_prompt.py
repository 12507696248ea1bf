"""The system prompt."""

from agent_sdk.agent.prompt import system_prompt
from agent_sdk.protocol.results import WorkspaceInfo

INFO = WorkspaceInfo(root="/r", working_dir="/r/w", platform="linux x86_64", python="3.11", confined=True)


def test_the_prompt_says_where_the_agent_is():
    prompt = system_prompt(INFO)
    assert "/r/w" in prompt
    assert "linux x86_64" in prompt
    assert "below /r only" in prompt


def test_instructions_of_the_user_come_last():
    assert system_prompt(INFO, "  Speak French.\n").endswith("Instructions of your user\nSpeak French.")


def test_the_prompt_is_short():
    assert len(system_prompt(INFO)) < 2500
