"""A scripted model: data in, the same answers out, wherever and however often it is opened."""

import asyncio

import pytest

from agent_sdk.agent.llm.client import open_model
from agent_sdk.models import AssistantTurn, Completion, ModelRequest, ToolTurn, UserTurn
from agent_sdk.protocol.errors import InvalidParams, ModelRefused, ModelUnavailable
from agent_sdk.protocol.specs import Call, Calls, Fail, Hang, Say, ScriptedLLM

LS = Call("terminal", {"command": "ls"}, "Let me look.")


def after(answers: int) -> ModelRequest:
    """The request of a conversation in which the model has spoken so many times."""
    turns = [UserTurn("go"), *(AssistantTurn(text="ok") for _ in range(answers))]
    return ModelRequest(system="You help.", turns=turns)


async def play(script: ScriptedLLM, answers: int = 0) -> Completion:
    return await open_model(script).complete(after(answers))


async def test_the_history_says_which_step_is_due():
    script = ScriptedLLM(steps=(LS, Say("Done.")))
    assert (await play(script, answers=1)).text == "Done."
    assert (await play(script, answers=0)).text == "Let me look."


async def test_a_call_has_json_arguments_and_a_reproducible_id():
    first, again = await play(ScriptedLLM(steps=(LS,))), await play(ScriptedLLM(steps=(LS,)))
    assert first == again
    assert [(use.call_id, use.tool, use.arguments) for use in first.tool_calls] == [
        ("call_0_0", "terminal", '{"command":"ls"}')
    ]
    assert first.finish_reason == "tool_calls"


async def test_call_ids_differ_within_an_answer_and_between_answers():
    script = ScriptedLLM(steps=(Calls((LS, LS)), Calls((LS, LS))))
    answers = [await play(script, answers=at) for at in (0, 1)]
    assert len({use.call_id for answer in answers for use in answer.tool_calls}) == 4


async def test_a_script_that_is_over_says_so():
    assert (await play(ScriptedLLM(steps=(LS,)), answers=7)).text == "The script is over."


async def test_a_repeating_script_gives_its_last_step_for_ever():
    answer = await play(ScriptedLLM(steps=(Say("first"), LS), repeat=True), answers=7)
    assert [use.call_id for use in answer.tool_calls] == ["call_7_0"]


async def test_the_pieces_of_an_answer_are_the_answer():
    pieces: list[str] = []
    text = "  Two words,\n\nand a last one. "
    client = open_model(ScriptedLLM(steps=(Say(text),)))
    await client.complete(after(0), on_delta=lambda piece, thinking: pieces.append(piece))
    assert "".join(pieces) == text
    assert len(pieces) == 6


async def test_usage_grows_with_what_was_said():
    script = ScriptedLLM(steps=(Say("x" * 400),), repeat=True)
    short, long = await play(script, answers=0), await play(script, answers=100)
    assert 0 < short.usage.input_tokens < long.usage.input_tokens
    assert short.usage.output_tokens == 100


async def test_what_tools_returned_counts_as_input():
    turns = [UserTurn("go"), ToolTurn(call_id="c", text="x" * 4000)]
    answer = await open_model(ScriptedLLM(steps=(LS,))).complete(ModelRequest(system="", turns=turns))
    assert answer.usage.input_tokens > 1000


async def test_a_scripted_failure_has_the_named_type():
    with pytest.raises(ModelRefused, match="no such model"):
        await play(ScriptedLLM(steps=(Fail("model_refused", "no such model"),)))


async def test_a_failure_in_mid_script_is_met_once_and_then_the_script_goes_on():
    client = open_model(ScriptedLLM(steps=(LS, Fail("model_unavailable"), Say("Back."))))
    await client.complete(after(0))
    with pytest.raises(ModelUnavailable):
        await client.complete(after(1))
    assert (await client.complete(after(1))).text == "Back."


async def test_a_failure_at_the_end_of_the_script_stays():
    client = open_model(ScriptedLLM(steps=(LS, Fail("model_unavailable"))))
    for _ in range(3):
        with pytest.raises(ModelUnavailable):
            await client.complete(after(1))


async def test_a_failure_of_an_unknown_kind_is_refused_at_once():
    with pytest.raises(InvalidParams, match="path_not_found"):
        open_model(ScriptedLLM(steps=(Fail("path_not_found"),)))


async def test_a_hanging_model_can_be_cancelled_and_asked_again():
    client = open_model(ScriptedLLM(steps=(Hang(), Say("Awake."))))
    asking = asyncio.ensure_future(client.complete(after(0)))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(10):
        assert (await client.complete(after(0))).text == "Awake."


async def test_a_hang_that_is_over_is_followed_by_the_answer():
    assert (await play(ScriptedLLM(steps=(Hang(0.001), Say("Awake."))))).text == "Awake."
