"""The contract of a model: what was said before goes in, one Completion comes out. `agent.llm` keeps it per dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Raw, Struct

from agent_sdk.protocol.specs import ToolSpec


class ToolUse(Struct, frozen=True, kw_only=True):
    """A tool call the model asked for."""

    call_id: str
    tool: str
    arguments: str
    """JSON text exactly as the model wrote it."""
    ask: bool = False
    """Somebody has to approve the call before it runs. No model says so, but a middleware."""


class UserTurn(Struct, frozen=True):
    """What a person said."""

    text: str


class AssistantTurn(Struct, frozen=True, kw_only=True):
    """What the model said earlier."""

    text: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    provider: Raw | None = None
    """Opaque JSON the provider wants back unchanged, from Completion.provider."""


class ToolTurn(Struct, frozen=True, kw_only=True):
    """What a tool returned; every ToolUse is followed by exactly one."""

    call_id: str
    text: str
    is_error: bool = False


Turn = UserTurn | AssistantTurn | ToolTurn


class ModelRequest(Struct, frozen=True, kw_only=True):
    """One model call."""

    system: str
    turns: tuple[Turn, ...] | list[Turn]
    tools: tuple[ToolSpec, ...] = ()


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens of one call, as the provider counted them."""

    input_tokens: int = 0
    """Cached ones included."""
    output_tokens: int = 0
    """Reasoning included."""
    cached_tokens: int = 0
    cost: float | None = None
    """US dollars, from the prices in the LLM; None: not known."""


class Completion(Struct, frozen=True, kw_only=True):
    """A whole answer of a model."""

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    usage: Usage = Usage()
    finish_reason: str = "stop"
    """`stop`, `tool_calls`, `length` (cut by the output limit), `context_window` (cut because that is full), `refused`
    (by the model), `filtered` (by the provider), or the provider's own word."""
    provider: Raw | None = None


CUT = ("length", "context_window")
"""Finish reasons of answers that are not whole."""
FINISH_REASONS = ("stop", "tool_calls", *CUT, "refused", "filtered")
"""Those that are ours; any other is a provider's word."""

OnDelta = Callable[[str, str], None]
"""Called with (text, thinking) for each streamed piece; must not block."""


class ModelClient(Protocol):
    """A way to reach a model. One per conversation; connections are shared underneath."""

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        """Ask once, without retrying.

        Cancelling closes the request.

        Raises:
            ModelRefused, ModelUnauthorized, ModelAnswerTooLarge: do not repeat.
            ModelRateLimited (details retry_after_ms when the provider said so), ModelUnavailable,
            ModelAnswerBroken: may be repeated.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
