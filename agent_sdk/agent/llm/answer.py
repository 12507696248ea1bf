"""An answer while it comes in: pieces become a Completion. Knows the limits; each dialect has a parser of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from agent_sdk.agent.llm.decoding import ServerSentEvent
from agent_sdk.agent.llm.failure import broken, failure_in, says_something, too_large
from agent_sdk.agent.llm.provider import Address
from agent_sdk.agent.mask import ELLIPSIS, shortened
from agent_sdk.models import FINISH_REASONS, Completion, OnDelta, ToolUse, Usage
from agent_sdk.protocol.errors import ModelError
from agent_sdk.protocol.specs import LLM
from agent_sdk.tools import as_utf8

T = TypeVar("T")

ANSWER_BYTES = 32 << 20
"""Of a whole answer, as it comes over the wire."""

ARGUMENTS_BYTES = 1 << 20
"""Of one tool call."""

TOOL_CALLS = 64
"""In one answer."""

PLACES = 4096
"""Blocks of content, or pieces of signed reasoning, in one answer."""

_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "tool_use": "tool_calls",
    "tool_call": "tool_calls",
    "function_call": "tool_calls",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "pause_turn": "length",
    "model_context_window_exceeded": "context_window",
    "context_length_exceeded": "context_window",
    "model_length": "context_window",
    "refusal": "refused",
    "content_filter": "filtered",
    "content_filtered": "filtered",
    "guardrail": "filtered",
    "guardrail_intervened": "filtered",
    "safety": "filtered",
    "recitation": "filtered",
    "blocklist": "filtered",
    "prohibited_content": "filtered",
    "sensitive": "filtered",
    "spii": "filtered",
}
"""What providers call it, in lower case, and what we do."""

_FAILED = (
    "error",
    "abort",
    "aborted",
    "cancelled",
    "engine_error",
    "insufficient_system_resource",
    "malformed_function_call",
    "network_error",
    "timeout",
)
"""Finish reasons of answers that came to no end."""

_NAME_CHARACTERS = 256
_MOST_TOKENS = 2**53
_WRITING_COSTS = 1.25
"""Anthropic's price of an input token that goes into the prompt cache, in input tokens."""


class Halves:
    """Joins characters that were cut between pieces of a text which is passed on as it comes."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def join(self, piece: str) -> str:
        """Return what can be passed on; the first half of a character waits for its second."""
        piece = self._held + piece
        self._held = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        return as_utf8(piece.removesuffix(self._held) if self._held else piece)


class ToolDraft:
    """A tool call that is being written."""

    __slots__ = ("call_id", "pieces", "size", "tool")

    def __init__(self) -> None:
        self.call_id = ""
        self.tool = ""
        self.pieces: list[str] = []
        self.size = 0


class ResponseParser(ABC):
    """Reads one answer, streamed or whole: collects its pieces, passes them on, and refuses what is too much."""

    def __init__(self, llm: LLM, address: Address, on_delta: OnDelta | None = None) -> None:
        self.address = address
        self.done = False
        """Whether the provider said that the answer is over."""
        self.calls: list[ToolDraft] = []
        self.finish_reason = ""
        self.usage = Usage()
        self._llm = llm
        self._on_delta = on_delta
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._text_halves, self._thinking_halves = Halves(), Halves()
        self._noted = b""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.address.model} [{len(self._text)} pieces, {len(self.calls)} calls]>"

    @abstractmethod
    def event(self, event: ServerSentEvent) -> None:
        """Take one event of a stream; kinds that are not known are passed over.

        Raises:
            ModelError: it makes no sense, or says that the model failed.
        """

    @abstractmethod
    def whole(self, body: bytes) -> None:
        """Take an answer that was not streamed. Raises as `event`."""

    @abstractmethod
    def conclude(self) -> Raw | None:
        """Take in what only its end says; return what the provider wants to see again.

        Raises:
            ModelError: what came is no answer.
        """

    @property
    def text(self) -> str:
        """What was said so far."""
        return as_utf8("".join(self._text))

    @property
    def thinking(self) -> str:
        """What was thought so far."""
        return as_utf8("".join(self._thinking))

    @property
    def has_begun(self) -> bool:
        """Whether anything of it has come."""
        return bool(self._text or self._thinking or self.calls)

    def note(self, data: bytes) -> None:
        """Remember JSON that is no piece of an answer, for the case that no answer comes."""
        if says_something(data):
            self._noted = data

    def failure(self, reason: str) -> ModelError:
        """Return why this is no answer: what the provider said instead of one, else the reason."""
        return failure_in(self._noted, self.address) if self._noted else broken(reason, self.address)

    def say(self, piece: str) -> None:
        """Add to the text."""
        if piece:
            self._text.append(piece)
            if self._on_delta is not None and (ready := self._text_halves.join(piece)):
                self._on_delta(ready, "")

    def think(self, piece: str) -> None:
        """Add to the thinking."""
        if piece:
            self._thinking.append(piece)
            if self._on_delta is not None and (ready := self._thinking_halves.join(piece)):
                self._on_delta("", ready)

    def open_call(self) -> ToolDraft:
        """Begin another tool call.

        Raises:
            ModelAnswerTooLarge: there are too many.
        """
        if len(self.calls) == TOOL_CALLS:
            raise too_large(TOOL_CALLS, "tool calls", self.address)
        draft = ToolDraft()
        self.calls.append(draft)
        return draft

    def add_arguments(self, draft: ToolDraft, piece: str) -> None:
        """Add to a call's arguments.

        Raises:
            ModelAnswerTooLarge: they are too long.
        """
        draft.size += len(piece) if piece.isascii() else len(piece.encode(errors="replace"))
        if draft.size > ARGUMENTS_BYTES:
            raise too_large(ARGUMENTS_BYTES, "bytes of arguments in one tool call", self.address)
        draft.pieces.append(piece)

    def finish(self, reason: object) -> None:
        """Take the provider's word for why the answer ends; a refusal stays one."""
        if reason and isinstance(reason, str) and self.finish_reason != "refused":
            word = reason.lower()
            known = word in FINISH_REASONS or word in _FAILED
            self.finish_reason = _REASONS.get(word) or (word if known else shortened(as_utf8(reason), 64))

    def count(self, *, given: int, said: int, cached: int = 0, written: int = 0) -> None:
        """Set the usage: all tokens given, said (with reasoning), read from and written into the prompt cache.

        What a provider counts may be nonsense; it is brought into a range that cannot make a budget negative.
        """
        given, said = _tokens(given), _tokens(said)
        cached = min(_tokens(cached), given)
        written = min(_tokens(written), given - cached)
        self.usage = Usage(
            input_tokens=given,
            output_tokens=said,
            cached_tokens=cached,
            cost=_cost(self._llm, given - cached + (_WRITING_COSTS - 1) * written, said, cached),
        )

    def usage_in(self, counts: Any, kind: type[T]) -> T | None:
        """Return what a provider counted; None for what makes no sense, which is no reason to lose the answer."""
        try:
            return msgspec.convert(counts, kind)
        except (msgspec.ValidationError, UnicodeError):
            return None

    def completion(self) -> Completion:
        """Return the answer after its last event.

        Raises:
            ModelAnswerBroken: it stopped before its end, or its finish reason is an error.
        """
        if not self.done and not self.finish_reason:
            raise self.failure("stopped in the middle")
        provider = self.conclude()
        reason = self.finish_reason
        if reason.lower() in _FAILED:
            said = f" after {self.text + ELLIPSIS!r}" if self.text else ""
            raise broken(f"ended with the finish reason {reason!r}{said}", self.address, finish_reason=reason)
        if reason in ("", "stop", "tool_calls"):  # some servers say `stop` after calling tools
            reason = "tool_calls" if self.calls else "stop"
        return Completion(
            text=self.text,
            thinking=self.thinking,
            tool_calls=tuple(map(self._use, self.calls)),
            usage=self.usage,
            finish_reason=reason,
            provider=provider,
        )

    def _use(self, draft: ToolDraft) -> ToolUse:
        return ToolUse(
            call_id=as_utf8(draft.call_id),
            tool=shortened(as_utf8(draft.tool.strip()), _NAME_CHARACTERS),
            arguments=as_utf8("".join(draft.pieces)),
        )


def _tokens(count: int) -> int:
    return max(0, min(count, _MOST_TOKENS))


def _cost(llm: LLM, fresh: float, said: int, cached: int) -> float | None:
    if llm.input_cost is None or llm.output_cost is None:
        return None
    cached_cost = llm.input_cost if llm.cached_input_cost is None else llm.cached_input_cost
    dollars = (fresh * llm.input_cost + cached * cached_cost + said * llm.output_cost) / 1e6
    return max(0.0, dollars) if math.isfinite(dollars) else None
