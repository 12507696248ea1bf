"""Good answers with something wrong in them: each is an answer or one typed error, and small damage loses nothing."""

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent_sdk.agent.llm.client import open_model
from agent_sdk.agent.llm.failure import failure_in, failure_of
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.models import Completion
from agent_sdk.protocol.errors import ModelError
from agent_sdk.protocol.specs import LLM
from tests.agent.llm.provider import HELLO, KEY

ARGUMENTS = '{"command": "ls"}'


def openai_stream() -> list[Any]:
    function = {"name": "terminal", "arguments": ARGUMENTS[:7]}
    call = {"index": 0, "id": "call_a", "type": "function", "function": function}
    rest = {"index": 0, "function": {"arguments": ARGUMENTS[7:]}}
    detail = {"type": "reasoning.text", "index": 0, "text": "Hm"}
    deltas = [
        {"role": "assistant", "content": "", "reasoning": "Hm", "reasoning_details": [detail]},
        {"reasoning": ".", "reasoning_details": [{**detail, "text": "."}]},
        {"content": "Look"},
        {"content": [{"type": "text", "text": "ing."}]},
        {"tool_calls": [call]},
        {"tool_calls": [rest]},
    ]
    chunks = [
        {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "error": None}
    details = {"prompt_tokens_details": {"cached_tokens": 1}}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, **details}}
    return [*chunks, end, usage, "[DONE]"]


def openai_whole() -> Any:
    call = {"id": "call_a", "type": "function", "function": {"name": "terminal", "arguments": ARGUMENTS}}
    message = {"role": "assistant", "content": "Looking.", "reasoning": "Hm.", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


BLOCKS = [
    {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
    {"type": "text", "text": "Looking."},
    {"type": "tool_use", "id": "call_a", "name": "terminal", "input": {"command": "ls"}},
]


def anthropic_stream() -> list[Any]:
    pieces = [
        [
            {"type": "thinking_delta", "thinking": "Hm."},
            {"type": "signature_delta", "signature": "c2ln"},
        ],
        [{"type": "text_delta", "text": "Look"}, {"type": "text_delta", "text": "ing."}],
        [{"type": "input_json_delta", "partial_json": piece} for piece in (ARGUMENTS[:7], ARGUMENTS[7:])],
    ]
    starts = [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {**BLOCKS[2], "input": {}},
    ]
    events: list[Any] = [{"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 3}}}]
    for index, (start, deltas) in enumerate(zip(starts, pieces, strict=True)):
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    end = {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 2}}
    return [*events, {"type": "ping"}, end, {"type": "message_stop"}]


def anthropic_whole() -> Any:
    usage = {"input_tokens": 3, "output_tokens": 2}
    return {"type": "message", "content": BLOCKS, "stop_reason": "tool_use", "usage": usage}


STREAMS = {"openai": openai_stream, "anthropic": anthropic_stream}
WHOLE = {"openai": openai_whole, "anthropic": anthropic_whole}
VALUES = [None, 7, -1.5, True, "x", "", "\ud83d", "\ude00", [], [None], [7], ["x"], {}, {"a": None}, 2**70]
UNKNOWN = [{}, {"type": "later"}, {"object": "later"}, {"type": "later", "index": 0, "text": "x"}, None, 7]
ENDS = [b"\n", b"\r\n", b"\r"]


def wire(parts: list[Any], end: bytes = b"\n") -> bytes:
    """The events as bytes."""
    lines = []
    for part in parts:
        data = b"[DONE]" if part == "[DONE]" else json.dumps(part).encode()
        name = part.get("type") if isinstance(part, dict) else None
        lines += [f"event: {name}".encode(errors="replace")] * isinstance(name, str) + [b"data: " + data, b""]
    return end.join([*lines, b""])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every member and item within: what holds it, and under which key."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutated(rng: random.Random, dialect: str) -> bytes:
    """One answer with one to three things wrong."""
    parts = copy.deepcopy([WHOLE[dialect]()] if (whole := rng.random() < 0.3) else STREAMS[dialect]())
    end = rng.choice(ENDS)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(parts))
        match rng.randrange(8):
            case 0 | 1 | 2:
                holder, key = rng.choice(list(places(parts)))
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            case 3:
                holder, key = rng.choice([p for p in places(parts) if isinstance(p[0], list)])
                holder.insert(key, copy.deepcopy(rng.choice(VALUES)))
            case 4 if not whole:
                del parts[max(at, 1) :]
            case 5 if not whole:
                parts.insert(at, copy.deepcopy(parts[at]))
            case 6 if not whole:
                other = rng.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case 7 if not whole:
                parts.insert(at, copy.deepcopy(rng.choice(UNKNOWN)))
    body = json.dumps(parts[0]).encode() if whole else wire(parts, end)
    match rng.randrange(8):
        case 0:
            at = rng.randrange(len(body))
            body = (
                body[:at]
                + rng.choice([b"\xff", b"\xed\xa0\xbd", b"\x00", b"\\ud83d", b": busy\n\n"])
                + body[at:]
            )
        case 1:
            body = body[: rng.randrange(len(body))]
        case 2:
            body = b"\xef\xbb\xbf" + body
        case 3:
            body = (b": busy" + end + end) * 3 + body
    return body


class Provider:
    """Answers with the body it was given last."""

    def __init__(self, dialect: str, url: str) -> None:
        self.body = b""
        self.client = open_model(LLM(model=f"{dialect}/m", api_key=KEY, base_url=url))

    async def ask(self, body: bytes) -> Completion:
        self.body = body
        async with asyncio.timeout(30):
            return await self.client.complete(
                HELLO, on_delta=lambda text, thinking: (text + thinking).encode()
            )


@pytest.fixture
async def provider(dialect: str) -> AsyncIterator[Provider]:
    async def respond(request: web.Request) -> web.Response:
        return web.Response(body=asked.body)

    app = web.Application()
    app.router.add_post("/v1/{tail:.*}", respond)
    async with TestServer(app) as server:
        asked = Provider(dialect, str(server.make_url("/v1")))
        yield asked
        await asked.client.close()


async def test_whatever_is_wrong_with_an_answer_it_is_an_answer_or_one_clear_error(
    provider: Provider, dialect: str
):
    rng = random.Random(5)
    for _ in range(250):
        body = mutated(rng, dialect)
        try:
            answer = await provider.ask(body)
        except ModelError as error:
            assert len(error.message) > 20 and error.message.isprintable(), body
        else:
            assert msgspec.json.decode(msgspec.json.encode(answer), type=dict), body
            assert answer.provider is None or msgspec.json.decode(answer.provider), body


ERRORS: list[Any] = [
    {
        "error": {
            "message": "m",
            "type": "overloaded_error",
            "code": 429,
            "metadata": {"raw": '{"error": "x"}'},
        }
    },
    [{"error": {"message": "m", "status": "X", "details": [{"a": 1}]}}],
    {"detail": [{"msg": "m", "loc": ["a"]}]},
    {"errors": ["m", "n"]},
]
PAUSES = ["-1", "1e9", "nan", "-inf", "²", "9" * 5000, "Tue, 14 Jul 0000 03:34:00 GMT", "soon", ""]


def test_whatever_is_wrong_with_an_error_it_is_one_clear_error():
    rng, address = random.Random(5), address_of(LLM(model="openai/m"))
    for _ in range(1000):
        parts = [copy.deepcopy(rng.choice(ERRORS))]
        for _ in range(rng.randint(1, 3)):
            holder, key = rng.choice(list(places(parts)))
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        body = json.dumps(parts[0]).encode()
        headers = {"Retry-After": rng.choice(PAUSES)}
        for error in (failure_in(body, address), failure_of(rng.randrange(200, 600), headers, body, address)):
            assert len(error.message) > 20 and error.message.isprintable(), body
            assert 0 < (error.retry_after_ms or 1) <= 600_000


def same(answer: Completion) -> tuple[object, ...]:
    calls = [(use.call_id, use.tool, json.loads(use.arguments)) for use in answer.tool_calls]
    return answer.text, answer.thinking, calls, answer.finish_reason


GOOD = ("Looking.", "Hm.", [("call_a", "terminal", {"command": "ls"})], "tool_calls")


async def test_a_null_that_stands_among_the_items_of_a_list_loses_nothing(provider: Provider, dialect: str):
    for make in (STREAMS[dialect], lambda: [WHOLE[dialect]()]):
        lists = [at for at, (holder, _) in enumerate(places(make())) if isinstance(holder, list)]
        for at in lists:
            parts = copy.deepcopy(make())
            holder, key = list(places(parts))[at]
            if holder is parts:
                continue
            holder.insert(key, None)
            body = wire(parts) if len(parts) > 1 else json.dumps(parts[0]).encode()
            assert same(await provider.ask(body)) == GOOD, body


async def test_what_says_nothing_between_events_loses_nothing(provider: Provider, dialect: str):
    parts = STREAMS[dialect]()
    nothing = {
        "openai": [{"choices": [None]}, {"choices": [{"delta": None}]}, {"choices": None}, {"later": 1}],
        "anthropic": [{"type": "later"}, {"type": None}, {"type": "ping", "index": None}],
    }
    for at in range(len(parts)):
        for end in ENDS:
            stream = wire([*parts[:at], *nothing[dialect], *parts[at:]], end)
            assert same(await provider.ask(b"\xef\xbb\xbf: busy" + end + end + stream)) == GOOD


async def test_a_wrong_byte_costs_one_character(provider: Provider, dialect: str):
    for body in (wire(STREAMS[dialect]()), json.dumps(WHOLE[dialect]()).encode()):
        answer = await provider.ask(body.replace(b"ing.", b"in\xffg."))
        assert same(answer) == ("Lookin\ufffdg.", *GOOD[1:])


@pytest.mark.parametrize(
    ("halves", "whole"),
    [(["\ud83d", "\ude00"], "😀"), (["a\ud83d", "\ude00b"], "a😀b"), (["a\ud83d", "b"], "a\ufffdb")]
    + [(["\ude00", "a"], "\ufffda"), (["a", "b\ud83d"], "ab\ufffd"), (["\ud83d\ude00", "a"], "😀a")],
)
async def test_halves_of_a_character_meet_and_a_lone_one_is_marked(
    dialect: str, provider: Provider, halves: list[str], whole: str
):
    heard = ["", ""]

    def hear(text: str, thinking: str) -> None:
        heard[0] += text.encode().decode()
        heard[1] += thinking.encode().decode()

    first, last = halves
    if dialect == "openai":
        function = [{"name": "t", "arguments": f'{{"a": "{first}'}, {"arguments": f'{last}"}}'}]
        pieces = [
            {"content": half, "reasoning": half, "tool_calls": [{"index": 0, "function": function[at]}]}
            for at, half in enumerate(halves)
        ]
        parts = [{"choices": [{"delta": piece}]} for piece in pieces]
        parts.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    else:
        kinds = {0: ("thinking", "thinking"), 1: ("text", "text"), 2: ("tool_use", "partial_json")}
        said = {2: (f'{{"a": "{first}', f'{last}"}}')}
        parts = []
        for index, (kind, member) in kinds.items():
            block = {"type": kind, "name": "t"}
            parts.append({"type": "content_block_start", "index": index, "content_block": block})
            for half in said.get(index, halves):
                delta = {"type": "x", member: half}
                parts.append({"type": "content_block_delta", "index": index, "delta": delta})
        parts.append({"type": "message_delta", "delta": {"stop_reason": "tool_use"}})
    provider.body = wire(parts)
    answer = await provider.client.complete(HELLO, on_delta=hear)
    assert (answer.text, answer.thinking, answer.tool_calls[0].arguments) == (
        whole,
        whole,
        f'{{"a": "{whole}"}}',
    )
    assert heard == [whole.removesuffix("\ufffd")] * 2 if last.endswith("\ud83d") else [whole] * 2
    assert answer.provider is not None and whole in bytes(answer.provider).decode()


@pytest.mark.parametrize("dialect", ["anthropic"])
async def test_arguments_of_a_call_that_never_began_are_not_left_out(provider: Provider):
    parts = anthropic_stream()
    (start,) = [part for part in parts if part.get("content_block", {}).get("type") == "tool_use"]
    parts.remove(start)
    parts.insert(-3, start)
    with pytest.raises(ModelError, match="never began"):
        await provider.ask(wire(parts))
