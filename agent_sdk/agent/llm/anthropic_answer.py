"""Reading an answer of Anthropic's messages API, whole or in pieces. No connection.

An answer is a list of blocks. Thinking blocks are signed, and have to come back unchanged and in
their place between text and tool calls; Completion.provider keeps them and the order of the others.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

from agent_sdk.agent.llm import lenient
from agent_sdk.agent.llm.answer import PLACES, Answer, ToolDraft
from agent_sdk.agent.llm.failure import broken, decoded, failure_in, too_large
from agent_sdk.agent.llm.history import keep
from agent_sdk.agent.llm.sse import ServerSentEvent
from agent_sdk.models import CUT, Completion
from agent_sdk.protocol.specs import Json
from agent_sdk.tools import as_utf8


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
        self.given = block.data or ("" if block.input is None else lenient.encode(block.input).decode())
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


class Reading:
    """Reads one answer, streamed or whole."""

    def __init__(self, answer: Answer) -> None:
        self.done = False
        """Whether the provider said that the stream is over."""
        self._answer = answer
        self._places: dict[int | None, _Place] = {}
        self._counts: dict[str, int] = {}

    def event(self, event: ServerSentEvent) -> None:
        """Take one event of a stream; kinds we do not know are passed over, as the API asks.

        Raises:
            ModelError: it makes no sense, or says that the model failed.
        """
        if event.data.strip() == b"[DONE]":
            return  # of a proxy that speaks both dialects
        taken = decoded(_event, event.data, self._answer.address)
        kind = taken.type
        if event.name == b"error" or kind == "error" or taken.error:
            raise failure_in(event.data, self._answer.address)
        if kind == "content_block_delta" and taken.delta is not None:
            self._extend(self._place(taken.index, None), taken.delta)
        elif kind == "content_block_start" and taken.content_block is not None:
            self._place(taken.index, taken.content_block)
        elif kind == "message_start" and isinstance(taken.message, dict):
            self._count(taken.message.get("usage"))
        elif kind == "message_delta":
            self._answer.finish(taken.delta.stop_reason if taken.delta else None)
            self._count(taken.usage)
        elif kind == "message_stop":
            self.done = True
        elif kind == "message":
            self.whole(event.data)
        elif not kind:
            self._answer.note(event.data)

    def whole(self, body: bytes) -> None:
        """Take an answer that was not streamed. Raises as `event`."""
        message = decoded(_whole, body, self._answer.address)
        if message.content is None:
            self._answer.note(body)
            raise self._answer.failure("has no content")
        for index, block in enumerate(filter(None, message.content)):
            self._place(index, block)
        self._answer.finish(message.stop_reason)
        self._count(message.usage)
        self.done = True

    def completion(self) -> Completion:
        """Return the answer after its last event.

        Raises:
            ModelAnswerBroken: the stream stopped before its end.
        """
        answer = self._answer
        if not self.done and not answer.finish_reason:
            raise answer.failure("stopped in the middle")
        last = next(reversed(self._places.values()), None)
        for place in self._places.values():
            cut = answer.finish_reason in CUT and place is last and place.given in ("", "{}")
            if place.draft and not place.draft.pieces and not cut:  # without arguments, or not streamed
                answer.add_arguments(place.draft, place.given or "{}")
        counts = self._counts
        read, written = counts.get("cache_read_input_tokens", 0), counts.get("cache_creation_input_tokens", 0)
        answer.count(
            given=counts.get("input_tokens", 0) + read + written,
            said=counts.get("output_tokens", 0),
            cached=read,
            written=written,
        )
        return answer.completion(self._provider())

    def _provider(self) -> Raw | None:
        """The thinking and its places; None without any. A signature that did not come makes it worthless."""
        places = [kept for place in self._places.values() if (kept := place.kept())]
        if self._answer.finish_reason in CUT:
            places = [kept for kept in places if kept["type"] != "thinking" or kept["signature"]]
        thought = any(kept["type"] in ("thinking", "redacted_thinking") for kept in places)
        return keep(self._answer.address, places=places) if thought else None

    def _place(self, index: int | None, block: _Block | None) -> _Place:
        """The block with this index; a new one when it starts, and for a text that never did."""
        known = self._places.get(index)
        if known is not None and (block is None or (known.draft and known.draft.call_id == block.id)):
            return known
        block = block or _Block(type="text")
        if len(self._places) == PLACES:
            raise too_large(PLACES, "blocks", self._answer.address)
        draft = None
        if block.type == "tool_use":
            draft = self._answer.open_call()
            draft.call_id, draft.tool = str(block.id or ""), block.name or ""
        place = self._places[index] = _Place(block, draft)
        self._extend(place, _Delta(text=block.text, thinking=block.thinking, signature=block.signature))
        return place

    def _extend(self, place: _Place, delta: _Delta) -> None:
        if delta.text:
            place.text.append(delta.text)
            self._answer.say(delta.text)
        if delta.partial_json and place.draft is not None:
            self._answer.add_arguments(place.draft, delta.partial_json)
        elif delta.partial_json and place.type == "text":  # running the call without them would be wrong
            raise broken("has arguments of a tool call that never began", self._answer.address)
        if delta.thinking:
            place.thinking.append(delta.thinking)
            self._answer.think(delta.thinking)
        if delta.signature:
            place.signature += delta.signature

    def _count(self, counts: Any) -> None:
        """Later counts replace earlier ones: the API gives running totals."""
        try:
            usage = msgspec.convert(counts, _Usage)
        except (msgspec.ValidationError, UnicodeError):
            return  # a count that makes no sense is no reason to lose the answer
        known = msgspec.structs.asdict(usage)
        self._counts.update({name: count for name, count in known.items() if count is not None})
