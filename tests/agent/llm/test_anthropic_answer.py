"""The dialect of Anthropic: what is read from an answer."""

from typing import Any

import msgspec
import pytest

from agent_sdk.agent.llm.anthropic import Parser, encode
from agent_sdk.agent.llm.decoding import ServerSentEvent
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.models import AssistantTurn, Completion, ModelRequest, ToolUse, UserTurn
from agent_sdk.protocol.errors import ModelAnswerBroken, ModelAnswerTooLarge, ModelRefused, ModelUnavailable
from agent_sdk.protocol.specs import LLM

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


def streamed(*events: object, llm: LLM = CLAUDE) -> Completion:
    reading = Parser(llm, address_of(llm))
    for event in events:
        reading.event(ServerSentEvent(event if isinstance(event, bytes) else msgspec.json.encode(event)))
    return reading.completion()


def start(index: int, kind: str, **members: object) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": {"type": kind, **members}}


def delta(index: int, **members: object) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": members}


def end(reason: str, **usage: int) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage}


def test_text_and_parallel_calls_are_read():
    answer = streamed(
        START,
        start(0, "text", text=""),
        {"type": "ping"},
        delta(0, type="text_delta", text="Look"),
        delta(0, type="text_delta", text="ing."),
        {"type": "content_block_stop", "index": 0},
        start(1, "tool_use", id="toolu_a", name="terminal", input={}),
        start(2, "tool_use", id="toolu_b", name="think", input={}),
        delta(2, type="input_json_delta", partial_json='{"thought"'),
        delta(1, type="input_json_delta", partial_json='{"command": "ls'),
        delta(2, type="input_json_delta", partial_json=': "x"}'),
        end("tool_use", output_tokens=9),
        STOP,
    )
    assert (answer.text, answer.finish_reason) == ("Looking.", "tool_calls")
    assert [(use.call_id, use.arguments) for use in answer.tool_calls] == [
        ("toolu_a", '{"command": "ls'),
        ("toolu_b", '{"thought": "x"}'),
    ]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 9)
    assert answer.provider is None


@pytest.mark.parametrize("given, kept", [({}, "{}"), ({"a": 1}, '{"a":1}')])
def test_a_call_without_pieces_has_the_arguments_of_its_start(given: object, kept: str):
    answer = streamed(START, start(0, "tool_use", id="c", name="t", input=given), end("tool_use"), STOP)
    assert answer.tool_calls[0].arguments == kept


THINKING = [
    START,
    start(0, "thinking", thinking="", signature=""),
    delta(0, type="thinking_delta", thinking="Let me "),
    delta(0, type="thinking_delta", thinking="see."),
    delta(0, type="signature_delta", signature="c2ln"),
    start(1, "redacted_thinking", data="ZW5j"),
    start(2, "text", text=""),
    delta(2, type="text_delta", text="First. "),
    start(3, "thinking", thinking="", signature=""),
    delta(3, type="signature_delta", signature="b3R0"),
    start(4, "text", text=""),
    delta(4, type="text_delta", text="Second."),
    start(5, "tool_use", id="toolu_a", name="terminal", input={}),
    delta(5, type="input_json_delta", partial_json='{"command": "ls"}'),
    end("tool_use"),
    STOP,
]


def test_thinking_goes_back_unchanged_and_in_its_place():
    answer = streamed(*THINKING)
    assert (answer.thinking, answer.text) == ("Let me see.", "First. Second.")
    turn = AssistantTurn(text=answer.text, tool_calls=answer.tool_calls, provider=answer.provider)
    assert messages(turn)[0]["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "ZW5j"},
        {"type": "text", "text": "First. "},
        {"type": "thinking", "thinking": "", "signature": "b3R0"},
        {"type": "text", "text": "Second."},
        {"type": "tool_use", "id": "toolu_a", "name": "terminal", "input": {"command": "ls"}},
    ]


def test_a_text_that_was_changed_meanwhile_is_sent_whole():
    answer = streamed(*THINKING)
    turn = AssistantTurn(
        text="First. <secret-hidden>.", tool_calls=answer.tool_calls, provider=answer.provider
    )
    texts = [block["text"] for block in messages(turn)[0]["content"] if block["type"] == "text"]
    assert "".join(texts) == "First. <secret-hidden>."


def test_thinking_does_not_go_to_another_model():
    answer = streamed(*THINKING)
    turn = AssistantTurn(text=answer.text, provider=answer.provider)
    other = LLM(model="anthropic/claude-opus-5")
    assert messages(turn, llm=other) == [
        {"role": "assistant", "content": [{"type": "text", "text": "First. Second."}]}
    ]


def test_thinking_that_was_cut_before_its_signature_is_not_kept():
    answer = streamed(
        START,
        start(0, "thinking", thinking="", signature=""),
        delta(0, type="thinking_delta", thinking="Hm"),
        end("max_tokens"),
        STOP,
    )
    assert (answer.finish_reason, answer.provider) == ("length", None)


def test_the_cache_is_counted_as_input_and_priced():
    llm = LLM(model="anthropic/c", input_cost=4.0, output_cost=20.0, cached_input_cost=0.4)
    usage = {"input_tokens": 10, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 100}
    answer = streamed(
        {"type": "message_start", "message": {"usage": {**usage, "output_tokens": 1}}},
        end("end_turn", output_tokens=50),
        STOP,
        llm=llm,
    )
    assert (answer.usage.input_tokens, answer.usage.cached_tokens) == (1110, 1000)
    assert answer.usage.cost == pytest.approx((10 * 4 + 100 * 4 * 1.25 + 1000 * 0.4 + 50 * 20) / 1e6)


@pytest.mark.parametrize(
    "usage", [None, {"input_tokens": -7}, {"input_tokens": "x"}, {"output_tokens": None}]
)
def test_counts_that_make_no_sense_do_not_lose_the_answer(usage: object):
    answer = streamed({"type": "message_start", "message": {"usage": usage}}, end("end_turn"), STOP)
    assert answer.usage.input_tokens == 0


@pytest.mark.parametrize(
    "reason, finish",
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("refusal", "refused"),
        ("pause_turn", "length"),
    ],
)
def test_the_reason_to_stop_is_translated(reason: str, finish: str):
    assert streamed(START, end(reason), STOP).finish_reason == finish


def test_kinds_that_came_later_are_passed_over():
    answer = streamed(
        START,
        {"type": "something_new"},
        start(0, "server_tool_use", id="s", name="search", input={}),
        delta(0, type="input_json_delta", partial_json="{}"),
        delta(0, type="citations_delta", citation={"a": 1}),
        start(1, "text", text="Hello"),
        end("end_turn"),
        STOP,
    )
    assert (answer.text, answer.tool_calls) == ("Hello", ())


def test_a_stream_without_its_end_is_broken():
    with pytest.raises(ModelAnswerBroken, match="middle"):
        streamed(START, start(0, "text", text="Hel"))


@pytest.mark.parametrize(
    "kind, error", [("overloaded_error", ModelUnavailable), ("invalid_request_error", ModelRefused)]
)
def test_an_error_in_the_stream_is_raised(kind: str, error: type[Exception]):
    with pytest.raises(error, match="no more"):
        streamed(START, {"type": "error", "error": {"type": kind, "message": "no more"}})


def test_an_error_without_its_object_is_raised():
    with pytest.raises(ModelAnswerBroken, match="stopped with an error: no more"):
        streamed(START, {"type": "error", "message": "no more"})


@pytest.mark.parametrize(
    "event",
    [b"{", b"[]", b'{"type": "x", "delta": 7}', b'{"index": "\\ud83d"}', b"\xff", b"[" * 100_000],
)
def test_an_event_that_makes_no_sense_is_a_broken_answer(event: bytes):
    with pytest.raises(ModelAnswerBroken, match="cannot be read"):
        streamed(START, event)


def test_a_whole_answer_is_read_like_a_stream():
    reading = Parser(CLAUDE, address_of(CLAUDE))
    reading.whole(
        msgspec.json.encode(
            {
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
                    {"type": "text", "text": "Yes."},
                    {"type": "tool_use", "id": "toolu_a", "name": "terminal", "input": {"command": "ls"}},
                ],
                "stop_reason": "tool_use",
                "usage": {"input_tokens": 3, "output_tokens": 2},
            }
        )
    )
    answer = reading.completion()
    assert (answer.thinking, answer.text, answer.usage.output_tokens) == ("Hm.", "Yes.", 2)
    assert answer.tool_calls[0].arguments == '{"command":"ls"}'
    assert answer.provider is not None


@pytest.mark.parametrize(
    "whole", [b"{}", b'{"content": null}', b'{"error": {"type": "x", "message": "m"}}', b"", b"<html>"]
)
def test_an_answer_without_content_is_broken(whole: bytes):
    reading = Parser(CLAUDE, address_of(CLAUDE))
    with pytest.raises(ModelAnswerBroken):
        reading.whole(whole)


def test_too_many_blocks_are_refused():
    with pytest.raises(ModelAnswerTooLarge, match="4096"):
        streamed(START, *(start(at, "text", text="") for at in range(5000)))
