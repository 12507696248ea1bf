"""The ways to a model: over HTTP to a provider, where one request has one answer or one typed error, or by a script.

A script is a model without a model: its client plays the steps of a ScriptedLLM, and knows no network and hardly any
clock. The number of assistant turns in the request says which answer is due, so a script goes on where it was after a
restart, wherever the conversation is opened again. Say, Call and Calls are answers; a Fail or Hang stands before the
answer that follows it and is met once by each client, so that a failure can be followed by a success. At the end of
the script the last Fail or Hang is met for ever.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec

from agent_sdk.agent.llm import anthropic, openai
from agent_sdk.agent.llm.answer import ANSWER_BYTES, ResponseParser
from agent_sdk.agent.llm.decoding import BOM, EventParser, is_whole
from agent_sdk.agent.llm.failure import ERROR_BYTES, beginning, broken, failure_of, too_large
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.models import (
    AssistantTurn,
    Completion,
    ModelClient,
    ModelRequest,
    OnDelta,
    ToolUse,
    Usage,
)
from agent_sdk.protocol.errors import InvalidParams, ModelAnswerBroken, ModelError, ModelRefused, table
from agent_sdk.protocol.specs import LLM, Call, Calls, Fail, Hang, Model, Say, ScriptedLLM

if TYPE_CHECKING:
    from agent_sdk.agent.llm.transport import Reply, Transport

THE_END = Say("The script is over.")

_FAILURES = {cls.kind: cls for cls in table() if issubclass(cls, ModelError)}
_PIECES = re.compile(r"\s*\S+\s*|\s+")
_CHARACTERS_PER_TOKEN = 4


def open_model(spec: Model) -> ModelClient:
    """Return a client for this model; nothing is connected yet. Close it when done.

    Raises:
        InvalidParams: the provider is unknown and no base_url is given, or the key, the address or
            a scripted step cannot be used.
    """
    return ScriptedClient(spec) if isinstance(spec, ScriptedLLM) else ProviderClient(spec)


class ProviderClient:
    """Asks one model. Connects at the first request and keeps connections until `close`.

    Raises:
        InvalidParams: the LLM cannot be reached as it is described.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._address = address_of(llm)
        self._transport: Transport | None = None

    def __repr__(self) -> str:
        state = "connected" if self._transport else "idle"
        return f"<ProviderClient of {self._address.provider}/{self._address.model} [{state}]>"

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        """Ask the provider once, without retrying. Raises as ModelClient.complete says.

        An answer has at most 32 MiB, 64 tool calls and 1 MiB of arguments each.
        """
        address = self._address
        dialect = anthropic if address.kind.dialect == "anthropic" else openai
        try:
            body = dialect.encode(request, self._llm, address)
        except UnicodeEncodeError:
            raise ModelRefused(
                "the conversation holds half a surrogate pair", provider=address.provider
            ) from None
        parser: ResponseParser = dialect.Parser(self._llm, address, on_delta)
        async with self._connections().post(body) as reply:
            if not 200 <= reply.status < 300:
                raise failure_of(reply.status, reply.headers, await reply.head(ERROR_BYTES), address)
            try:
                await self._read(reply, parser)
                return parser.completion()
            except ModelAnswerBroken as exc:
                if reply.broken is not None:
                    raise reply.broken from exc
                raise

    async def close(self) -> None:
        """Let go of connections; the next request makes new ones."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()

    def _connections(self) -> Transport:
        if self._transport is None:
            from agent_sdk.agent.llm.transport import Transport  # noqa: PLC0415 - imports aiohttp

            self._transport = Transport(self._address, self._llm.timeout)
        return self._transport

    async def _read(self, reply: Reply, parser: ResponseParser) -> None:
        """Feed the body to `parser`. Its first bytes say what it is, not what it is called or how it was asked for."""
        body, head = self._limited(reply.pieces()), b""
        async for piece in body:
            head += piece
            if head.strip() and not BOM.startswith(head):
                break
        match head.removeprefix(BOM).lstrip()[:1]:
            case b"":
                raise broken("is empty", self._address)
            case b"<":
                raise broken("is a web page; is base_url right?", self._address, status=reply.status)
            case b"{" | b"[":
                rest = [piece async for piece in body]
                parser.whole(b"".join((head.removeprefix(BOM), *rest)))
            case _:
                await self._read_events(head, body, parser)
                await reply.drain()

    async def _read_events(self, head: bytes, body: AsyncIterator[bytes], parser: ResponseParser) -> None:
        stream, heard = EventParser(), False
        piece: bytes | None = head
        while piece is not None:
            for event in stream.feed(piece):
                heard = True
                parser.event(event)
                if parser.done:
                    return
            piece = await anext(body, None)
        for event in stream.end():
            if is_whole(event.data):  # else the stream broke off within it
                heard = True
                parser.event(event)
        if not heard:
            said = beginning(head, self._address)
            raise broken(f"is neither JSON nor a stream of events: {said}", self._address)

    async def _limited(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        size = 0
        async for piece in pieces:
            size += len(piece)
            if size > ANSWER_BYTES:
                raise too_large(ANSWER_BYTES, "bytes", self._address)
            yield piece


class ScriptedClient:
    """Plays one script.

    Raises:
        InvalidParams: a Fail names no kind of ModelError.
    """

    def __init__(self, script: ScriptedLLM) -> None:
        self._repeat = script.repeat
        self._answers: list[Say | Call | Calls] = []
        self._before: list[list[Fail | Hang]] = [[]]
        for step in script.steps:
            if not isinstance(step, Fail | Hang):
                self._answers.append(step)
                self._before.append([])
                continue
            if isinstance(step, Fail) and step.error not in _FAILURES:
                known = ", ".join(sorted(_FAILURES))
                raise InvalidParams(f"a scripted failure is one of {known}; not {step.error[:64]!r}")
            self._before[-1].append(step)
        self._due = 0
        self._met = 0

    def __repr__(self) -> str:
        return f"<ScriptedClient [{self._due} of {len(self._answers)} answers given]>"

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        """Answer with the next step. A Hang waits; cancelling ends it, and it counts as met.

        Raises:
            ModelError: the kind that the Fail names.
        """
        due, characters = _history(request)
        if due != self._due:
            self._due, self._met = due, 0
        step = await self._step(due, on_delta)
        await asyncio.sleep(0)  # an answer of a real model can be cancelled, too
        answer = _answer(step, due, characters)
        if on_delta is not None:
            for piece in _PIECES.findall(answer.text):
                on_delta(piece, "")
        return answer

    async def close(self) -> None:
        """Nothing is held."""

    async def _step(self, due: int, on_delta: OnDelta | None) -> Say | Call | Calls:
        over = due >= len(self._answers)
        before = self._before[min(due, len(self._answers))]
        while self._met < len(before) or (over and before):
            obstacle = before[min(self._met, len(before) - 1)]
            self._met += 1
            if isinstance(obstacle, Fail):
                raise _FAILURES[obstacle.error](obstacle.message, provider="scripted")
            if on_delta is not None and obstacle.text:
                on_delta(obstacle.text, "")
            await asyncio.sleep(obstacle.seconds)
            if over:
                return THE_END
        if not over:
            return self._answers[due]
        return self._answers[-1] if self._repeat and self._answers else THE_END


def _history(request: ModelRequest) -> tuple[int, int]:
    """How many answers there were, and how much text."""
    answers, characters = 0, len(request.system)
    for turn in request.turns:
        characters += len(turn.text)
        if isinstance(turn, AssistantTurn):
            answers += 1
            for use in turn.tool_calls:
                characters += len(use.arguments)
    return answers, characters


def _answer(step: Say | Call | Calls, due: int, characters: int) -> Completion:
    calls = () if isinstance(step, Say) else step.calls if isinstance(step, Calls) else (step,)
    uses = tuple(
        ToolUse(
            call_id=f"call_{due}_{at}", tool=call.tool, arguments=msgspec.json.encode(call.arguments).decode()
        )
        for at, call in enumerate(calls)
    )
    said = len(step.text) + sum(len(use.arguments) for use in uses)
    return Completion(
        text=step.text,
        tool_calls=uses,
        usage=Usage(
            input_tokens=-(-characters // _CHARACTERS_PER_TOKEN),
            output_tokens=-(-said // _CHARACTERS_PER_TOKEN),
        ),
        finish_reason="tool_calls" if uses else "stop",
    )
