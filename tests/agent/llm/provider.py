"""A provider made of a few lines of aiohttp, which sends whatever a test wants."""

import json
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from agent_sdk.models import Completion, ModelRequest, UserTurn

KEY = "sk-0123456789abcdef"
HELLO = ModelRequest(system="Help.", turns=[UserTurn("hi")])
STREAM = {"Content-Type": "text/event-stream"}
JSON = {"Content-Type": "application/json"}

WHOLE = {
    "openai": {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]},
    "anthropic": {"type": "message", "content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn"},
}
"""An answer that was not streamed."""

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]
Ask = Callable[..., Awaitable[Completion]]


def events(dialect: str, text: str) -> bytes:
    """A stream that says the text, one character per event."""
    if dialect == "openai":
        said = [{"choices": [{"delta": {"content": char}}]} for char in text]
        parts = [*said, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        lines = [f"data: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts]
        return "".join([*lines, "data: [DONE]\n\n"]).encode()
    said = [{"type": "content_block_delta", "index": 0, "delta": {"text": char}} for char in text]
    ending = [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"}]
    parts = [{"type": "message_start", "message": {}}, *said, *ending]
    return "".join(
        f"event: {part['type']}\ndata: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts
    ).encode()


def sending(pieces: Iterable[bytes], headers: dict[str, str], *, cut: bool = False) -> Respond:
    """A handler that sends these pieces, each when the one before has left, and may then drop the line."""

    async def respond(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if cut:
            request.transport.abort()
        return response

    return respond
