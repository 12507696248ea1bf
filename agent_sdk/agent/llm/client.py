"""A model of a provider, reached over HTTP: one request, one answer, one typed error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_sdk.agent.llm import anthropic, openai
from agent_sdk.agent.llm.answer import ANSWER_BYTES, Answer
from agent_sdk.agent.llm.anthropic_answer import Reading as AnthropicReading
from agent_sdk.agent.llm.contract import Completion, ModelRequest, OnDelta
from agent_sdk.agent.llm.failure import ERROR_BYTES, broken, failure_of
from agent_sdk.agent.llm.openai_answer import Reading as OpenAIReading
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.agent.llm.sse import EventParser
from agent_sdk.protocol.errors import ModelRefused
from agent_sdk.protocol.specs import LLM

if TYPE_CHECKING:
    from agent_sdk.agent.llm.transport import Reply, Transport


class ProviderClient:
    """Asks one model. Connects at the first request and keeps connections until `close`.

    Raises:
        InvalidParams: the LLM cannot be reached as it is described; see `address_of`.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._address = address_of(llm)
        self._transport: Transport | None = None

    def __repr__(self) -> str:
        state = "connected" if self._transport else "idle"
        return f"<ProviderClient of {self._address.provider}/{self._address.model} [{state}]>"

    async def complete(self, request: ModelRequest, *, on_delta: OnDelta | None = None) -> Completion:
        """See ModelClient.complete. An answer has at most 32 MiB, 64 tool calls and 1 MiB of arguments each."""
        address = self._address
        encode = anthropic.encode if address.kind.dialect == "anthropic" else openai.encode
        try:
            body = encode(request, self._llm, address)
        except UnicodeEncodeError:
            raise ModelRefused(
                "the conversation holds half a surrogate pair", provider=address.provider
            ) from None
        answer = Answer(self._llm, address, request, on_delta)
        reading = AnthropicReading(answer) if address.kind.dialect == "anthropic" else OpenAIReading(answer)
        async with self._connections().post(body) as reply:
            if reply.status != 200:
                raise failure_of(reply.status, reply.headers, await reply.head(ERROR_BYTES), address)
            await self._read(reply, reading)
        return reading.completion()

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

    async def _read(self, reply: Reply, reading: AnthropicReading | OpenAIReading) -> None:
        """Feed the body to `reading`. How it is sent decides, not how it was asked for: not every server can stream."""
        kind = reply.content_type
        if kind in ("text/html", "application/xhtml+xml"):
            raise broken("is a web page; is base_url right?", self._address, status=reply.status)
        streamed = kind == "text/event-stream" or (self._llm.stream and not kind.endswith("json"))
        if not streamed:
            body = await reply.head(ANSWER_BYTES + 1)
            self._check_size(len(body))
            reading.whole(body)
            return
        parser, size = EventParser(), 0
        async for piece in reply.pieces():
            size += len(piece)
            self._check_size(size)
            for event in parser.feed(piece):
                reading.event(event)
                if reading.done:
                    await reply.drain()
                    return

    def _check_size(self, size: int) -> None:
        if size > ANSWER_BYTES:
            raise broken(f"has more than {ANSWER_BYTES} bytes", self._address, limit=ANSWER_BYTES)
