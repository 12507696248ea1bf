"""The dialect of Anthropic: what is asked."""

from typing import Any

import msgspec

from agent_sdk.agent.llm.anthropic import encode
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.models import AssistantTurn, ModelRequest, ToolTurn, ToolUse, UserTurn
from agent_sdk.protocol.specs import LLM, ToolSpec

CLAUDE = LLM(model="anthropic/claude-sonnet-5")
HELLO = ModelRequest(system="Help.", turns=[UserTurn("hi")])
CACHED = {"cache_control": {"type": "ephemeral"}}
A = ToolUse(call_id="toolu_a", tool="terminal", arguments='{"command": "ls"}')
B = ToolUse(call_id="toolu_b", tool="think", arguments='{"thought": "x"}')

START = {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}
STOP = {"type": "message_stop"}


def body(request: ModelRequest = HELLO, llm: LLM = CLAUDE) -> dict[str, Any]:
    return msgspec.json.decode(encode(request, llm, address_of(llm)))


def messages(*turns: Any, llm: LLM = CLAUDE) -> list[dict[str, Any]]:
    """The messages without the marks for the cache."""
    sent = body(ModelRequest(system="", turns=turns), llm)["messages"]
    for message in sent:
        for block in message["content"]:
            block.pop("cache_control", None)
    return sent


def test_a_conversation_becomes_alternating_messages_with_results_first():
    sent = messages(
        UserTurn("go"),
        AssistantTurn(text="Looking.", tool_calls=(A, B)),
        ToolTurn(call_id="toolu_a", text="a.txt"),
        UserTurn("and hurry"),
        ToolTurn(call_id="toolu_b", text="", is_error=True),
    )
    assert sent == [
        {"role": "user", "content": [{"type": "text", "text": "go"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "toolu_a", "name": "terminal", "input": {"command": "ls"}},
                {"type": "tool_use", "id": "toolu_b", "name": "think", "input": {"thought": "x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_a",
                    "content": [{"type": "text", "text": "a.txt"}],
                },
                {"type": "tool_result", "tool_use_id": "toolu_b", "is_error": True},
                {"type": "text", "text": "and hurry"},
            ],
        },
    ]


def test_blank_texts_do_not_become_blocks():
    sent = messages(UserTurn(" "), AssistantTurn(text="\n"), AssistantTurn(text="", tool_calls=(A,)))
    assert sent[0]["content"] == [{"type": "text", "text": "(no text)"}]
    assert [block["type"] for block in sent[1]["content"]] == ["tool_use"]


def test_malformed_arguments_go_back_in_an_object():
    use = ToolUse(call_id="c", tool="t", arguments='{"command": "ls')
    assert messages(AssistantTurn(tool_calls=(use,)))[0]["content"][0]["input"] == {
        "malformed_arguments": '{"command": "ls'
    }


def test_ids_of_another_provider_are_replaced_alike_in_call_and_result():
    use = ToolUse(call_id="functions.terminal:0", tool="t", arguments="{}")
    sent = messages(AssistantTurn(tool_calls=(use,)), ToolTurn(call_id=use.call_id, text="x"))
    given = sent[0]["content"][0]["id"]
    assert given == sent[1]["content"][0]["tool_use_id"]
    assert given.isalnum()


def test_the_prompt_cache_is_marked_after_the_system_prompt_and_the_last_two_of_the_user():
    request = ModelRequest(
        system="Help.",
        turns=[
            UserTurn("one"),
            AssistantTurn(text="a"),
            UserTurn("two"),
            AssistantTurn(tool_calls=(A,)),
            ToolTurn(call_id="toolu_a", text="x"),
        ],
        tools=(ToolSpec(name="terminal", description="Runs.", parameters={"type": "object"}),),
    )
    asked = body(request)
    assert asked["system"] == [{"type": "text", "text": "Help.", **CACHED}]
    marked = ["cache_control" in message["content"][-1] for message in asked["messages"]]
    assert marked == [False, False, True, False, True]
    assert asked["tools"] == [
        {"name": "terminal", "description": "Runs.", "input_schema": {"type": "object"}}
    ]


def test_only_what_is_set_is_asked_for():
    assert set(body()) == {"model", "max_tokens", "messages", "stream", "system"}
    asked = body(llm=LLM(model="anthropic/c", temperature=0.5, max_output_tokens=7, stream=False))
    assert (asked["temperature"], asked["max_tokens"], asked["stream"]) == (0.5, 7, False)


def test_reasoning_effort_becomes_adaptive_thinking():
    asked = body(llm=LLM(model="anthropic/c", temperature=0.5, reasoning_effort="high"))
    assert asked["output_config"] == {"effort": "high"}
    assert asked["thinking"]["type"] == "adaptive"
    assert "temperature" not in asked
    assert body(llm=LLM(model="anthropic/c", reasoning_effort="none"))["thinking"] == {"type": "disabled"}
