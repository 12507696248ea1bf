"""Anthropic's messages API: asking, and reading what comes back. No connection.

An answer is a list of blocks. Thinking blocks are signed, and have to come back unchanged and in
their place between text and tool calls; Completion.provider keeps them and the order of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Raw, Struct

from agent_sdk.agent.llm.answer import PLACES, ResponseParser, ToolDraft
from agent_sdk.agent.llm.decoding import ServerSentEvent, encode_json
from agent_sdk.agent.llm.failure import broken, decoded, failure_in, too_large
from agent_sdk.agent.llm.provider import (
    Address,
    is_blank,
    provider_state,
    sanitized_arguments,
    sanitized_id,
    sanitized_name,
    state_of,
)
from agent_sdk.models import CUT, AssistantTurn, ModelRequest, OnDelta, ToolTurn, ToolUse, Turn
from agent_sdk.protocol.specs import LLM, Json
from agent_sdk.tools import as_utf8

MAX_TOKENS = 32_000
"""Longest answer when LLM.max_output_tokens is not set; the API wants a number, and current models allow this one."""

_CACHED = {"type": "ephemeral"}


def encode(request: ModelRequest, llm: LLM, address: Address) -> bytes:
    """Return the body of the request, with three marks for the prompt cache: after the tools and the
    system prompt, after the last message, and after the last but one of the user's side, where the
    previous request ended."""
    messages = _messages(request.turns, address)
    for message in [m for m in messages if m["role"] == "user"][-2:]:
        message["content"][-1]["cache_control"] = _CACHED
    body: Json = {
        "model": address.model,
        "max_tokens": llm.max_output_tokens or MAX_TOKENS,
        "messages": messages,
        "stream": llm.stream,
    }
    if request.system.strip():
        body["system"] = [{"type": "text", "text": request.system, "cache_control": _CACHED}]
    if request.tools:
        body["tools"] = [
            {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
            for tool in request.tools
        ]
    if llm.reasoning_effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif llm.reasoning_effort is not None:
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
        body["output_config"] = {"effort": llm.reasoning_effort}
    if llm.temperature is not None and "output_config" not in body:  # refused together with thinking
        body["temperature"] = llm.temperature
    return msgspec.json.encode(body)


def _messages(turns: Iterable[Turn], address: Address) -> list[Json]:
    """Turns as alternating messages: what stands between two answers is one message, tool results first."""
    messages: list[Json] = []
    for turn in turns:
        if is_blank(turn):
            continue
        said_by_model = isinstance(turn, AssistantTurn)
        blocks = _said(turn, address) if isinstance(turn, AssistantTurn) else [_given(turn, address)]
        if not blocks:
            continue
        role = "assistant" if said_by_model else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"].extend(blocks)
        else:
            messages.append({"role": role, "content": blocks})
    for message in messages:
        if message["role"] == "user":
            message["content"].sort(key=lambda block: block["type"] != "tool_result")
    return messages


def _given(turn: Turn, address: Address) -> Json:
    if not isinstance(turn, ToolTurn):
        return _text(turn.text) or {"type": "text", "text": "(no text)"}
    block: Json = {"type": "tool_result", "tool_use_id": sanitized_id(turn.call_id, address)}
    if text := _text(turn.text):
        block["content"] = [text]
    if turn.is_error:
        block["is_error"] = True
    return block


def _text(text: str) -> Json | None:
    """A block of text; None for a blank one, which the API refuses."""
    return {"type": "text", "text": text} if text.strip() else None


def _said(turn: AssistantTurn, address: Address) -> list[Json]:
    """An earlier answer; the kept places say where its thinking stood between text and calls."""
    blocks: list[Json | None] = []
    calls, start = iter(turn.tool_calls), 0
    places = state_of(turn, address).get("places") or []
    last_text = max((at for at, place in enumerate(places) if place["type"] == "text"), default=-1)
    for at, place in enumerate(places):
        if place["type"] == "text":
            end = len(turn.text) if at == last_text else start + place["characters"]
            blocks.append(_text(turn.text[start:end]))
            start = end
        elif place["type"] == "tool_use":
            blocks.extend(_use(use, address) for use in itertools.islice(calls, 1))
        else:
            blocks.append(place)
    blocks.append(_text(turn.text[start:]))
    blocks.extend(_use(use, address) for use in calls)
    return [block for block in blocks if block]


def _use(use: ToolUse, address: Address) -> Json:
    return {
        "type": "tool_use",
        "id": sanitized_id(use.call_id, address),
        "name": sanitized_name(use.tool),
        "input": Raw(sanitized_arguments(use.arguments).encode()),
    }


class _Usage(Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Block(Struct, gc=False, omit_defaults=True):
    type: str | None = None
    text: str | None = None
    id: str | int | None = None
    name: str | None = None
    input: Any = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


class _Delta(Struct, gc=False):
    text: str | None = None
    partial_json: str | None = None
    thinking: str | None = None
    signature: str | None = None
    stop_reason: Any = None


class _Message(Struct, gc=False):
    content: list[_Block | None] | None = None
    stop_reason: Any = None
    usage: Any = None


class _Event(Struct, gc=False):
    """Any event of a stream; which members are set depends on its type."""

    type: str | None = None
    index: int | None = None
    message: Any = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: Any = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)
_whole = msgspec.json.Decoder(_Message)


class _Place:
    """A block of the answer, in its place."""

    __slots__ = ("draft", "given", "signature", "text", "thinking", "type")

    def __init__(self, block: _Block, draft: ToolDraft | None) -> None:
        self.type = block.type
        self.draft = draft
        self.given = block.data or ("" if block.input is None else encode_json(block.input).decode())
        self.text: list[str] = []
        self.thinking: list[str] = []
        self.signature = ""

    def kept(self) -> Json | None:
        """What has to be remembered of it; None for a kind we know nothing about."""
        if self.type == "thinking":
            return {"type": "thinking", "thinking": "".join(self.thinking), "signature": self.signature}
        if self.type == "redacted_thinking":
            return {"type": "redacted_thinking", "data": self.given}
        if self.type == "text":
            return {"type": "text", "characters": len(as_utf8("".join(self.text)))}
        return {"type": "tool_use"} if self.draft else None


class Parser(ResponseParser):
    """Reads an answer of this dialect."""

    def __init__(self, llm: LLM, address: Address, on_delta: OnDelta | None = None) -> None:
        super().__init__(llm, address, on_delta)
        self._places: dict[int | None, _Place] = {}
        self._counts: dict[str, int] = {}

    def event(self, event: ServerSentEvent) -> None:
        if event.data.strip() == b"[DONE]":
            return  # of a proxy that speaks both dialects
        taken = decoded(_event, event.data, self.address)
        kind = taken.type
        if event.name == b"error" or kind == "error" or taken.error:
            raise failure_in(event.data, self.address)
        if kind == "content_block_delta" and taken.delta is not None:
            self._extend(self._place(taken.index, None), taken.delta)
        elif kind == "content_block_start" and taken.content_block is not None:
            self._place(taken.index, taken.content_block)
        elif kind == "message_start" and isinstance(taken.message, dict):
            self._count(taken.message.get("usage"))
        elif kind == "message_delta":
            self.finish(taken.delta.stop_reason if taken.delta else None)
            self._count(taken.usage)
        elif kind == "message_stop":
            self.done = True
        elif kind == "message":
            self.whole(event.data)
        elif not kind:
            self.note(event.data)

    def whole(self, body: bytes) -> None:
        message = decoded(_whole, body, self.address)
        if message.content is None:
            self.note(body)
            raise self.failure("has no content")
        for index, block in enumerate(filter(None, message.content)):
            self._place(index, block)
        self.finish(message.stop_reason)
        self._count(message.usage)
        self.done = True

    def conclude(self) -> Raw | None:
        last = next(reversed(self._places.values()), None)
        for place in self._places.values():
            cut = self.finish_reason in CUT and place is last and place.given in ("", "{}")
            if place.draft and not place.draft.pieces and not cut:  # without arguments, or not streamed
                self.add_arguments(place.draft, place.given or "{}")
        counts = self._counts
        read, written = counts.get("cache_read_input_tokens", 0), counts.get("cache_creation_input_tokens", 0)
        self.count(
            given=counts.get("input_tokens", 0) + read + written,
            said=counts.get("output_tokens", 0),
            cached=read,
            written=written,
        )
        # The thinking and its places; None without any. A signature that did not come makes it worthless.
        places = [one for place in self._places.values() if (one := place.kept())]
        if self.finish_reason in CUT:
            places = [one for one in places if one["type"] != "thinking" or one["signature"]]
        thought = any(one["type"] in ("thinking", "redacted_thinking") for one in places)
        return provider_state(self.address, places=places) if thought else None

    def _place(self, index: int | None, block: _Block | None) -> _Place:
        """The block with this index; a new one when it starts, and for a text that never did."""
        known = self._places.get(index)
        if known is not None and (block is None or (known.draft and known.draft.call_id == block.id)):
            return known
        block = block or _Block(type="text")
        if len(self._places) == PLACES:
            raise too_large(PLACES, "blocks", self.address)
        draft = None
        if block.type == "tool_use":
            draft = self.open_call()
            draft.call_id, draft.tool = str(block.id or ""), block.name or ""
        place = self._places[index] = _Place(block, draft)
        self._extend(place, _Delta(text=block.text, thinking=block.thinking, signature=block.signature))
        return place

    def _extend(self, place: _Place, delta: _Delta) -> None:
        if delta.text:
            place.text.append(delta.text)
            self.say(delta.text)
        if delta.partial_json and place.draft is not None:
            self.add_arguments(place.draft, delta.partial_json)
        elif delta.partial_json and place.type == "text":  # running the call without them would be wrong
            raise broken("has arguments of a tool call that never began", self.address)
        if delta.thinking:
            place.thinking.append(delta.thinking)
            self.think(delta.thinking)
        if delta.signature:
            place.signature += delta.signature

    def _count(self, counts: Any) -> None:
        """Later counts replace earlier ones: the API gives running totals."""
        if (usage := self.usage_in(counts, _Usage)) is not None:
            known = msgspec.structs.asdict(usage)
            self._counts.update({name: count for name, count in known.items() if count is not None})
