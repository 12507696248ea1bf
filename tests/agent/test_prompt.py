"""The system prompt."""

from agent_sdk.agent.middleware.chain import chain_of
from agent_sdk.middleware import TurnContext
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import ConfirmationPolicy

INFO = WorkspaceInfo(root="/r", working_dir="/r/w", platform="linux x86_64", python="3.11", confined=True)


async def described():
    return INFO


async def system_prompt(instructions=""):
    turn = TurnContext(
        run_id="run",
        workspace=None,
        tools={},
        model_calls=0,
        max_model_calls=1,
        confirmation=ConfirmationPolicy(),
        describe=described,
        hide=str,
        append=None,
    )
    return await chain_of((), instructions=instructions).prompt(turn)


async def test_the_prompt_says_where_the_agent_is():
    prompt = await system_prompt()
    assert "/r/w" in prompt
    assert "linux x86_64" in prompt
    assert "below /r only" in prompt


async def test_instructions_of_the_user_come_last():
    assert (await system_prompt("  Speak French.\n")).endswith("Instructions of your user\nSpeak French.")


async def test_the_prompt_is_short():
    assert len(await system_prompt()) < 2500
