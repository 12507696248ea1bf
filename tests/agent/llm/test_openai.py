"""The dialect of OpenAI: what is asked."""

from typing import Any

import msgspec
import pytest

from agent_sdk.agent.llm.openai import encode
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.models import AssistantTurn, ModelRequest, ToolTurn, ToolUse, UserTurn
from agent_sdk.protocol.specs import LLM, ToolSpec

GPT = LLM(model="openai/gpt-5.5")
TOOL = ToolSpec(name="terminal", description="Runs.", parameters={"type": "object"})
HELLO = ModelRequest(system="Help.", turns=[UserTurn("hi")])


def body(request: ModelRequest = HELLO, llm: LLM = GPT) -> dict[str, Any]:
    return msgspec.json.decode(encode(request, llm, address_of(llm)))


def conversation(use: ToolUse, provider: msgspec.Raw | None = None) -> ModelRequest:
    turns = [
        UserTurn("go"),
        AssistantTurn(text="", tool_calls=(use,), provider=provider),
        ToolTurn(call_id=use.call_id, text="a.txt"),
    ]
    return ModelRequest(system="Help.", turns=turns, tools=(TOOL,))


USE = ToolUse(call_id="call_1", tool="terminal", arguments='{"command": "ls"}')


def test_a_conversation_becomes_messages():
    asked = body(conversation(USE))
    function = {"name": "terminal", "arguments": '{"command": "ls"}'}
    assert asked["messages"] == [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "a.txt"},
    ]
    assert asked["tools"][0]["function"] == {
        "name": "terminal",
        "description": "Runs.",
        "parameters": {"type": "object"},
    }


def test_only_what_is_set_is_asked_for():
    assert set(body()) == {"model", "messages", "stream", "stream_options"}
    llm = LLM(model="openai/m", temperature=0.0, max_output_tokens=9, reasoning_effort="low", stream=False)
    asked = body(llm=llm)
    assert (asked["temperature"], asked["max_completion_tokens"], asked["reasoning_effort"]) == (
        0.0,
        9,
        "low",
    )
    assert "stream_options" not in asked


def test_mistral_gets_only_what_it_takes():
    llm = LLM(model="mistral/m", max_output_tokens=9)
    asked = body(conversation(USE), llm)
    assert "stream_options" not in asked
    assert asked["max_tokens"] == 9
    ids = {asked["messages"][2]["tool_calls"][0]["id"], asked["messages"][3]["tool_call_id"]}
    assert [len(call_id) for call_id in ids] == [9]


@pytest.mark.parametrize(
    "written, sent",
    [
        ("", "{}"),
        (" ", "{}"),
        ('{"a": 1 }', '{"a": 1 }'),
        ('{"a": ', '{"malformed_arguments":"{\\"a\\": "}'),
        ("[1]", '{"malformed_arguments":"[1]"}'),
        ("null", "{}"),
    ],
)
def test_arguments_go_back_as_an_object_whatever_the_model_wrote(written: str, sent: str):
    use = ToolUse(call_id="c", tool="terminal", arguments=written)
    assert body(conversation(use))["messages"][2]["tool_calls"][0]["function"]["arguments"] == sent


def test_deeply_nested_arguments_do_not_break_the_request():
    use = ToolUse(call_id="c", tool="terminal", arguments='{"a":' + "[" * 100_000)
    sent = body(conversation(use))["messages"][2]["tool_calls"][0]["function"]["arguments"]
    assert sent.startswith('{"malformed_arguments"')


@pytest.mark.parametrize("name, sent", [("", "unnamed"), ("a b.c", "a_b_c"), ("x" * 99, "x" * 64)])
def test_a_tool_that_the_model_made_up_goes_back_under_a_name_that_is_allowed(name: str, sent: str):
    use = ToolUse(call_id="c", tool=name, arguments="{}")
    assert body(conversation(use))["messages"][2]["tool_calls"][0]["function"]["name"] == sent
