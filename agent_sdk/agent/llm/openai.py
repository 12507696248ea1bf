"""OpenAI's chat completions, as many providers and local servers speak them: asking, and reading what comes back.

What a model wants to see again goes back to it: the reasoning of an earlier answer (DeepSeek refuses
a request without it), signatures beside tool calls (Gemini), `reasoning_details` (OpenRouter).

Answers have accents. Reasoning comes as `reasoning_content` or `reasoning`, text as a string or a
list of parts; tool calls may come without index or id, or several under one index. No connection.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

from agent_sdk.agent.llm.answer import PLACES, ResponseParser, ToolDraft
from agent_sdk.agent.llm.decoding import ServerSentEvent, encode_json
from agent_sdk.agent.llm.failure import decoded, failure_in, too_large
from agent_sdk.agent.llm.provider import (
    Address,
    is_blank,
    provider_state,
    sanitized_arguments,
    sanitized_id,
    sanitized_name,
    state_of,
)
from agent_sdk.models import AssistantTurn, ModelRequest, OnDelta, ToolTurn, Turn
from agent_sdk.protocol.specs import LLM, Json, ToolSpec


def encode(request: ModelRequest, llm: LLM, address: Address) -> bytes:
    """Return the body of the request."""
    messages: list[Json] = [{"role": "system", "content": request.system}] if request.system else []
    messages.extend(_message(turn, address) for turn in request.turns if not is_blank(turn))
    body: Json = {"model": address.model, "messages": messages, "stream": llm.stream}
    if llm.stream and address.kind.asks_for_usage:
        body["stream_options"] = {"include_usage": True}
    if request.tools:
        body["tools"] = [{"type": "function", "function": _function(tool)} for tool in request.tools]
    if llm.temperature is not None:
        body["temperature"] = llm.temperature
    if llm.max_output_tokens is not None:
        body[address.kind.limit] = llm.max_output_tokens
    if llm.reasoning_effort is not None:
        body["reasoning_effort"] = llm.reasoning_effort
    return msgspec.json.encode(body)


def _function(tool: ToolSpec) -> Json:
    return {"name": tool.name, "description": tool.description, "parameters": tool.parameters}


def _message(turn: Turn, address: Address) -> Json:
    if isinstance(turn, ToolTurn):
        return {"role": "tool", "tool_call_id": sanitized_id(turn.call_id, address), "content": turn.text}
    if not isinstance(turn, AssistantTurn):
        return {"role": "user", "content": turn.text}
    again = state_of(turn, address)
    message: Json = {"role": "assistant", "content": turn.text, **(again.get("message") or {})}
    if turn.tool_calls:
        message["content"] = turn.text or None
        message["tool_calls"] = [
            {
                "id": sanitized_id(use.call_id, address),
                "type": "function",
                "function": {
                    "name": sanitized_name(use.tool),
                    "arguments": sanitized_arguments(use.arguments),
                },
            }
            for use in turn.tool_calls
        ]
        for call, members in zip(message["tool_calls"], again.get("calls") or (), strict=False):
            call.update(members)
    return message


class _Function(Struct, gc=False):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _ToolCall(Struct, gc=False):
    index: int | None = None
    id: str | int | None = None
    function: _Function | None = None
    extra_content: Any = None


class _Part(Struct, gc=False):
    text: str | None = None
    thinking: list[_Part | None] | str | None = None


class _Message(Struct, gc=False):
    """A delta of a stream, or a whole message."""

    content: str | list[_Part | None] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    reasoning_details: Any = None
    tool_calls: list[_ToolCall | None] | None = None


class _Choice(Struct, gc=False):
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: Any = None
    error: Any = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice | None] | None = None
    usage: Any = None
    error: Any = None
    object: Any = None


class _Details(Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None


_chunk = msgspec.json.Decoder(_Chunk)


class Parser(ResponseParser):
    """Reads an answer of this dialect."""

    def __init__(self, llm: LLM, address: Address, on_delta: OnDelta | None = None) -> None:
        super().__init__(llm, address, on_delta)
        self._drafts: dict[int | str, ToolDraft] = {}
        self._extras: list[Json] = []
        self._details: list[Json] = []
        self._thinks_in = ""

    def event(self, event: ServerSentEvent) -> None:
        if event.data.strip() == b"[DONE]":
            self.done = True
            return
        self._take(event.data, whole=False, failed=event.name == b"error")

    def whole(self, body: bytes) -> None:
        self._take(body, whole=True)
        self.done = True

    def conclude(self) -> Raw | None:
        if not (self.finish_reason or self.calls or self.text):
            raise self.failure("is empty")
        members: Json = {}
        if self._details:
            members["message"] = {"reasoning_details": self._details}
        elif self._thinks_in:
            members["message"] = {self._thinks_in: self.thinking}
        if any(self._extras):
            members["calls"] = self._extras
        return provider_state(self.address, **members) if members else None

    def _take(self, data: bytes, *, whole: bool, failed: bool = False) -> None:
        chunk = decoded(_chunk, data, self.address)
        if failed or chunk.object == "error" or chunk.error:
            raise failure_in(data, self.address)
        choice = next(filter(None, chunk.choices or ()), None)
        if choice is not None:
            if choice.error:  # OpenRouter's
                raise failure_in({"error": choice.error}, self.address)
            message = (choice.message or choice.delta) if whole else choice.delta
            if message is None and not self.has_begun:
                message, whole = choice.message, True  # a whole answer as the only event of a stream
            if message is not None:
                self._read(message, whole=whole)
            self.finish(choice.finish_reason)
        else:
            self.note(data)
            if whole:
                raise self.failure("has no choices")
        if chunk.usage:
            self._count(chunk.usage)

    def _read(self, message: _Message, *, whole: bool) -> None:
        if message.reasoning_content or message.reasoning:
            self._think(message)
        if isinstance(message.reasoning_details, list):
            self._keep_details(message.reasoning_details)
        if message.content:
            if isinstance(message.content, str):
                self.say(message.content)
            else:
                self._read_parts(message.content)
        if message.refusal:
            self.say(message.refusal)
            self.finish_reason = "refused"
        if message.tool_calls:
            for position, call in enumerate(filter(None, message.tool_calls)):
                if whole:
                    call.index = position
                self._call(call)

    def _think(self, message: _Message) -> None:
        """Some servers fill both fields with the same; the first one met counts."""
        self._thinks_in = self._thinks_in or (
            "reasoning_content" if message.reasoning_content else "reasoning"
        )
        piece = message.reasoning if self._thinks_in == "reasoning" else message.reasoning_content
        self.think(piece or "")

    def _read_parts(self, parts: list[_Part | None]) -> None:
        for part in filter(None, parts):
            if isinstance(part.thinking, str):
                self.think(part.thinking)
            elif part.thinking:
                for thought in filter(None, part.thinking):
                    self.think(thought.text or "")
            elif part.text:
                self.say(part.text)

    def _keep_details(self, details: list[Any]) -> None:
        """Join the pieces of a text, which have the same type and index; encrypted ones come whole."""
        for detail in details:
            if not isinstance(detail, dict):
                continue
            last = self._details[-1] if self._details else {}
            same = all(last.get(key) == detail.get(key) for key in ("type", "index"))
            if not last or not same or detail.get("type") == "reasoning.encrypted":
                if len(self._details) == PLACES:
                    raise too_large(PLACES, "pieces of reasoning", self.address)
                self._details.append(detail)
                continue
            for key, value in detail.items():
                before = last.get(key) or ""
                if key in ("text", "summary") and isinstance(value, str) and isinstance(before, str):
                    last[key] = before + value
                elif value is not None:
                    last[key] = value

    def _call(self, call: _ToolCall) -> None:
        draft = self._draft(call)
        function = call.function or _Function()
        draft.call_id = draft.call_id or str(call.id or "")
        draft.tool = draft.tool or function.name or ""
        if isinstance(function.arguments, str):
            self.add_arguments(draft, function.arguments)
        elif function.arguments is not None:
            self.add_arguments(draft, encode_json(function.arguments).decode())
        if call.extra_content:
            at = self.calls.index(draft)
            self._extras[at] = {"extra_content": call.extra_content}

    def _draft(self, call: _ToolCall) -> ToolDraft:
        """The call this piece belongs to: by index, else by id, else the last one unless it has a name of its own."""
        key = call.index if call.index is not None else call.id
        name = call.function.name if call.function else None
        if key is None:
            known = None if name or not self.calls else self.calls[-1]
        else:
            known = self._drafts.get(key)
            if known and name and call.id and known.call_id and call.id != known.call_id:
                known = None  # another call under the same index
        if known is not None:
            return known
        draft = self.open_call()
        self._extras.append({})
        if key is not None:
            self._drafts[key] = draft
        return draft

    def _count(self, counts: Any) -> None:
        usage = self.usage_in(counts, _Usage)
        if usage is None:
            return
        given, said = usage.prompt_tokens or 0, usage.completion_tokens or 0
        details = usage.prompt_tokens_details
        cached = (details.cached_tokens if details else None) or usage.prompt_cache_hit_tokens or 0
        reasoning = usage.completion_tokens_details and usage.completion_tokens_details.reasoning_tokens
        if reasoning and usage.total_tokens == given + said + reasoning:
            said += reasoning  # xAI counts it apart
        self.count(given=given, said=said, cached=cached)
