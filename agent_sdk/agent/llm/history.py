"""What was said before, made acceptable to a provider.

A log outlives models: it may hold call ids of another provider, a tool name or arguments that a model
made up. Providers refuse such a request as a whole, and the conversation could never go on. So each
is replaced on its way out, always by the same, while the log keeps what the model wrote.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
from msgspec import Raw

from agent_sdk.agent.llm import lenient
from agent_sdk.agent.llm.provider import Address
from agent_sdk.models import AssistantTurn, Turn

_object: msgspec.json.Decoder[dict[str, Raw]] = msgspec.json.Decoder(dict[str, Raw])
_kept: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])

_NO_NAME = re.compile(r"[^a-zA-Z0-9_-]")


def is_blank(turn: Turn) -> bool:
    """Whether it is an answer without text and calls, which providers refuse to be shown again."""
    return isinstance(turn, AssistantTurn) and not turn.tool_calls and not turn.text.strip()


def fitting_id(call_id: str, address: Address) -> str:
    """The call's id, or a digest of it where the provider would not take it."""
    if re.fullmatch(address.kind.call_id, call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


def fitting_name(tool: str) -> str:
    """The tool's name, with `_` for every character that providers do not allow."""
    return _NO_NAME.sub("_", tool)[:64] or "unnamed"


def fitting_arguments(arguments: str) -> str:
    """JSON text of an object: the arguments, or an object that holds what the model wrote instead of one."""
    if arguments.strip() in ("", "null"):
        return "{}"
    try:
        _object.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return msgspec.json.encode({"malformed_arguments": arguments}).decode()
    return arguments


def keep(address: Address, **members: Any) -> Raw:
    """Completion.provider: what this very model wants to see again, marked as its own."""
    return Raw(lenient.encode({"provider": address.provider, "model": address.model, **members}))


def kept(turn: AssistantTurn, address: Address) -> dict[str, Any]:
    """What `keep` was given, if the same model said this turn; else nothing: signatures do not travel."""
    if turn.provider is None:
        return {}
    try:
        members = _kept.decode(turn.provider)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return {}
    same = members.get("provider") == address.provider and members.get("model") == address.model
    return members if same else {}
