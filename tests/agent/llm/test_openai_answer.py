"""The dialect of OpenAI: what is read from the answers of many servers."""

import json
from typing import Any

import msgspec
import pytest

from agent_sdk.agent.llm.decoding import ServerSentEvent
from agent_sdk.agent.llm.openai import Parser, encode
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.models import AssistantTurn, Completion, ModelRequest, ToolTurn, ToolUse, UserTurn
from agent_sdk.protocol.errors import ModelAnswerBroken, ModelError, ModelRateLimited, ModelUnavailable
from agent_sdk.protocol.specs import LLM, ToolSpec

GPT = LLM(model="openai/gpt-5.5")
TOOL = ToolSpec(name="terminal", description="Runs.", parameters={"type": "object"})
HELLO = ModelRequest(system="Help.", turns=[UserTurn("hi")])


def body(request: ModelRequest = HELLO, llm: LLM = GPT) -> dict[str, Any]:
    return msgspec.json.decode(encode(request, llm, address_of(llm)))


def reading(llm: LLM = GPT) -> Parser:
    return Parser(llm, address_of(llm))


def streamed(*chunks: object, llm: LLM = GPT) -> Completion:
    stream = reading(llm)
    for chunk in (*chunks, b"[DONE]"):
        stream.event(ServerSentEvent(chunk if isinstance(chunk, bytes) else msgspec.json.encode(chunk)))
    return stream.completion()


def whole(answer: object) -> Completion:
    read = reading()
    read.whole(answer if isinstance(answer, bytes) else msgspec.json.encode(answer))
    return read.completion()


def delta(finish: str | None = None, **members: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": members, "finish_reason": finish}]}


def call(**members: object) -> dict[str, Any]:
    name, arguments = members.pop("name", None), members.pop("arguments", None)
    return delta(tool_calls=[{**members, "function": {"name": name, "arguments": arguments}}])


def conversation(use: ToolUse, provider: msgspec.Raw | None = None) -> ModelRequest:
    turns = [
        UserTurn("go"),
        AssistantTurn(text="", tool_calls=(use,), provider=provider),
        ToolTurn(call_id=use.call_id, text="a.txt"),
    ]
    return ModelRequest(system="Help.", turns=turns, tools=(TOOL,))


USE = ToolUse(call_id="call_1", tool="terminal", arguments='{"command": "ls"}')


def test_pieces_of_parallel_calls_are_put_together_by_index():
    answer = streamed(
        call(index=0, id="a", name="terminal", arguments=""),
        call(index=1, id="b", name="think", arguments='{"x"'),
        call(index=0, arguments='{"y": '),
        call(index=1, arguments=":1}"),
        call(index=0, arguments="2}"),
        delta("tool_calls"),
    )
    assert [(use.call_id, use.tool, use.arguments) for use in answer.tool_calls] == [
        ("a", "terminal", '{"y": 2}'),
        ("b", "think", '{"x":1}'),
    ]


@pytest.mark.parametrize(
    "chunks",
    [
        [call(id="a", name="t", arguments="{"), call(arguments="}"), call(id="b", name="u", arguments="[]")],
        [call(name="t", arguments="{"), call(arguments="}"), call(name="u", arguments="[]")],
        [
            call(id="a", name="t", arguments="{"),
            call(id="a", arguments="}"),
            call(id="b", name="u", arguments="[]"),
        ],
        [call(index=0, id="a", name="t", arguments="{}"), call(index=0, id="b", name="u", arguments="[]")],
        [call(index=0, id="a", name="t", arguments="{"), call(index=0, id="a", name="t", arguments="}")]
        + [call(index=3, id="b", name="u", arguments="[]")],
    ],
    ids=["no index", "no index, no id", "id in every piece", "the same index twice", "name in every piece"],
)
def test_servers_that_number_calls_badly_are_understood(chunks: list[dict[str, Any]]):
    answer = streamed(*chunks)
    assert [(use.tool, use.arguments) for use in answer.tool_calls] == [("t", "{}"), ("u", "[]")]


def test_arguments_that_come_as_an_object_become_text():
    assert streamed(call(index=0, name="t", arguments={"a": 1})).tool_calls[0].arguments == '{"a":1}'


@pytest.mark.parametrize(
    "chunk", [{"choices": None}, {"choices": []}, delta(), delta(content=None), {"id": 1}]
)
def test_empty_chunks_say_nothing(chunk: dict[str, Any]):
    assert streamed(chunk, delta("stop", content="x")).text == "x"


@pytest.mark.parametrize(
    "reason, calls, finish",
    [
        ("stop", False, "stop"),
        ("stop", True, "tool_calls"),
        ("tool_calls", False, "stop"),
        ("function_call", True, "tool_calls"),
        ("length", True, "length"),
        ("content_filter", False, "filtered"),
        ("something_new", False, "something_new"),
    ],
)
def test_the_reason_to_stop_is_translated(reason: str, calls: bool, finish: str):
    chunks = [call(index=0, name="t", arguments="{}")] if calls else [delta(content="x")]
    assert streamed(*chunks, delta(reason)).finish_reason == finish


def test_a_refusal_is_text_and_a_reason():
    answer = streamed(delta(refusal="I won't."), delta("stop"))
    assert (answer.text, answer.finish_reason) == ("I won't.", "refused")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_thinking_and_goes_back_under_its_name(field: str):
    llm = LLM(model="deepseek/reasoner")
    answer = streamed(
        delta(**{field: "Hm, "}), delta(**{field: "yes."}), delta("stop", content="Yes."), llm=llm
    )
    assert (answer.thinking, answer.text) == ("Hm, yes.", "Yes.")
    again = ModelRequest(system="", turns=[AssistantTurn(text="Yes.", provider=answer.provider)])
    assert body(again, llm)["messages"] == [{"role": "assistant", "content": "Yes.", field: "Hm, yes."}]
    assert field not in body(again, GPT)["messages"][0]


def test_reasoning_that_comes_twice_is_read_once():
    assert streamed(delta(reasoning="a", reasoning_content="a"), delta("stop")).thinking == "a"


def test_signatures_beside_tool_calls_go_back_to_the_same_call():
    llm = LLM(model="gemini/gemini-3-pro")
    signed = {"google": {"thought_signature": "c2ln"}}
    answer = streamed(
        call(index=0, id="a", name="t", arguments="{}", extra_content=signed),
        call(index=1, id="b", name="t", arguments="{}"),
        llm=llm,
    )
    turn = AssistantTurn(tool_calls=answer.tool_calls, provider=answer.provider)
    calls = body(ModelRequest(system="", turns=[turn]), llm)["messages"][0]["tool_calls"]
    assert [sent.get("extra_content") for sent in calls] == [signed, None]


def test_reasoning_details_are_joined_and_go_back():
    llm = LLM(model="openrouter/anthropic/claude-sonnet-5")
    answer = streamed(
        delta(reasoning="A", reasoning_details=[{"type": "reasoning.text", "index": 0, "text": "A"}]),
        delta(reasoning="B", reasoning_details=[{"type": "reasoning.text", "index": 0, "text": "B"}]),
        delta(reasoning_details=[{"type": "reasoning.text", "index": 0, "signature": "S"}]),
        delta(reasoning_details=[{"type": "reasoning.encrypted", "index": 1, "data": "D"}]),
        delta("stop", content="x"),
        llm=llm,
    )
    turn = AssistantTurn(text="x", provider=answer.provider)
    assert body(ModelRequest(system="", turns=[turn]), llm)["messages"][0]["reasoning_details"] == [
        {"type": "reasoning.text", "index": 0, "text": "AB", "signature": "S"},
        {"type": "reasoning.encrypted", "index": 1, "data": "D"},
    ]


def test_content_in_parts_is_text_and_thinking():
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    answer = streamed(delta(content=[thought]), delta("stop", content=[{"type": "text", "text": "Yes."}]))
    assert (answer.thinking, answer.text) == ("Hm.", "Yes.")


def test_a_whole_answer_is_read_like_a_stream():
    calls = [
        {"id": "a", "function": {"name": "t", "arguments": "{}"}},
        {"id": "b", "function": {"name": "u", "arguments": "{}"}},
    ]
    answer = whole(
        {
            "choices": [{"message": {"content": "x", "tool_calls": calls}, "finish_reason": "tool_calls"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        }
    )
    assert (answer.text, [use.tool for use in answer.tool_calls]) == ("x", ["t", "u"])
    assert answer.usage.input_tokens == 3


@pytest.mark.parametrize(
    "usage, counted",
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, (10, 5, 0)),
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}},
            (10, 5, 8),
        ),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 4}, (10, 5, 4)),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 15,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            (10, 5, 0),
        ),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 18,
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            (10, 8, 0),
        ),
        ({"prompt_tokens": -10, "completion_tokens": -5, "prompt_cache_hit_tokens": -1}, (0, 0, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 99}, (10, 5, 10)),
        ({"prompt_tokens": 10**30, "completion_tokens": 5}, (2**53, 5, 0)),
        ({"prompt_tokens": "many"}, (0, 0, 0)),
        (None, (0, 0, 0)),
    ],
)
def test_usage_is_normalised_whatever_the_provider_counts(usage: object, counted: tuple[int, int, int]):
    got = streamed(delta("stop", content="x"), {"choices": [], "usage": usage}).usage
    assert (got.input_tokens, got.output_tokens, got.cached_tokens) == counted


@pytest.mark.parametrize(
    "chunk",
    [
        b"{",
        b"not json",
        b'{"choices": "\xff"}',
        b'{"choices": 7}',
        b'{"choices": [{"delta": {"content": 7}}]}',
        b'{"choices": [{"delta": {"tool_calls": {"a": 1}}}]}',
        b'{"x": ' + b"[" * 100_000,
        b'{"choices": "\\ud800"}',
        b"\x00",
    ],
)
def test_a_chunk_that_makes_no_sense_is_a_broken_answer(chunk: bytes):
    with pytest.raises(ModelAnswerBroken, match="cannot be read"):
        streamed(delta(content="x"), chunk)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"message": None}]}])
def test_an_answer_without_content_is_broken(answer: object):
    with pytest.raises(ModelAnswerBroken):
        whole(answer)


def test_a_stream_that_says_nothing_is_broken():
    with pytest.raises(ModelAnswerBroken, match="empty"):
        streamed()


def test_a_model_may_have_nothing_to_say():
    assert streamed(delta("stop")).text == ""


def test_an_error_in_the_stream_is_raised():
    with pytest.raises(ModelRateLimited, match="slow down"):
        streamed(delta(content="x"), {"error": {"code": 429, "message": "slow down"}})
    with pytest.raises(ModelAnswerBroken, match="boom"):
        streamed(delta(content="x"), {"object": "error", "message": "boom"})


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        ({"code": 502, "message": "the upstream is down"}, ModelUnavailable, "the upstream is down"),
        ({"code": "server_error", "message": "no \ud83d luck"}, ModelAnswerBroken, "no luck"),
        ("out of luck", ModelAnswerBroken, "out of luck"),
        (
            {"message": "Provider returned error", "metadata": {"raw": '{"error": {"message": "too long"}}'}},
            ModelAnswerBroken,
            "Provider returned error: too long",
        ),
    ],
)
def test_an_error_within_a_choice_is_told_in_the_providers_words(error: object, kind: type, said: str):
    choice = {"finish_reason": "error", "error": error}
    for read, member in ((streamed, "delta"), (whole, "message")):
        chunk = json.dumps({"choices": [{**choice, member: {"content": "half"}}]}).encode()
        with pytest.raises(ModelError, match=f"{said}$") as caught:
            read(chunk)
        assert type(caught.value) is kind


def test_a_stream_without_its_end_is_broken_unless_the_model_had_finished():
    stream = reading()
    stream.event(ServerSentEvent(msgspec.json.encode(delta(content="half"))))
    with pytest.raises(ModelAnswerBroken, match="middle"):
        stream.completion()
    stream.event(ServerSentEvent(msgspec.json.encode(delta("stop", content=" a loaf"))))
    assert stream.completion().text == "half a loaf"
