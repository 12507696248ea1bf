"""A model of a provider, reached over HTTP: one request, one answer, one typed error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from agent_sdk.agent.llm import anthropic, openai
from agent_sdk.agent.llm.answer import ANSWER_BYTES, ResponseParser
from agent_sdk.agent.llm.decoding import BOM, EventParser, is_whole
from agent_sdk.agent.llm.failure import ERROR_BYTES, beginning, broken, failure_of, too_large
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.agent.llm.scripted import ScriptedClient
from agent_sdk.models import Completion, ModelClient, ModelRequest, OnDelta
from agent_sdk.protocol.errors import ModelAnswerBroken, ModelRefused
from agent_sdk.protocol.specs import LLM, Model, ScriptedLLM

if TYPE_CHECKING:
    from agent_sdk.agent.llm.transport import Reply, Transport


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
