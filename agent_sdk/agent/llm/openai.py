"""Asking in OpenAI's chat completions, as many providers and local servers speak them. No connection.

What a model wants to see again goes back to it: the reasoning of an earlier answer (DeepSeek refuses
a request without it), signatures beside tool calls (Gemini), `reasoning_details` (OpenRouter).
"""

from __future__ import annotations

import msgspec

from agent_sdk.agent.llm.history import fitting_arguments, fitting_id, fitting_name, is_blank, kept
from agent_sdk.agent.llm.provider import Address
from agent_sdk.models import AssistantTurn, ModelRequest, ToolTurn, Turn
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
        return {"role": "tool", "tool_call_id": fitting_id(turn.call_id, address), "content": turn.text}
    if not isinstance(turn, AssistantTurn):
        return {"role": "user", "content": turn.text}
    again = kept(turn, address)
    message: Json = {"role": "assistant", "content": turn.text, **(again.get("message") or {})}
    if turn.tool_calls:
        message["content"] = turn.text or None
        message["tool_calls"] = [
            {
                "id": fitting_id(use.call_id, address),
                "type": "function",
                "function": {"name": fitting_name(use.tool), "arguments": fitting_arguments(use.arguments)},
            }
            for use in turn.tool_calls
        ]
        for call, members in zip(message["tool_calls"], again.get("calls") or (), strict=False):
            call.update(members)
    return message
