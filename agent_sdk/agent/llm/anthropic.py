"""Asking in Anthropic's messages API. No connection."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec
from msgspec import Raw

from agent_sdk.agent.llm.history import fitting_arguments, fitting_id, fitting_name, is_blank, kept
from agent_sdk.agent.llm.provider import Address
from agent_sdk.models import AssistantTurn, ModelRequest, ToolTurn, ToolUse, Turn
from agent_sdk.protocol.specs import LLM, Json

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
    block: Json = {"type": "tool_result", "tool_use_id": fitting_id(turn.call_id, address)}
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
    places = kept(turn, address).get("places") or []
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
        "id": fitting_id(use.call_id, address),
        "name": fitting_name(use.tool),
        "input": Raw(fitting_arguments(use.arguments).encode()),
    }
