"""How much of a tool's result goes into the log."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from agent_sdk.middleware import Middleware, RunTool, TurnContext
from agent_sdk.protocol.events import ToolCalled
from agent_sdk.tools import ToolResult

RESULT_BYTES = 32 << 20
"""UTF-8 bytes of a tool result that go into the log."""
RESULT_JSON_BYTES = 56 << 20
"""The same as JSON, where a control character takes six bytes: an event has to fit into one message (64 MiB)."""


class ToolOutput(Middleware, frozen=True):
    """Cuts long results in their middle."""

    async def around_tool(self, turn: TurnContext, call: ToolCalled, run: RunTool) -> ToolResult:
        result = await run(call)
        text = result.text
        # All that is written is masked there, but what may be cut is masked before.
        if len(text) > RESULT_BYTES // 8:
            text = turn.hide(text)
        text, cut = truncated_result(text)
        return result if text == result.text else replace(result, text=text, bytes_cut=result.bytes_cut + cut)


def truncated_result(text: str) -> tuple[str, int]:
    """Return what of a tool's result goes into the log, and how many of its UTF-8 bytes were left out."""
    limit = RESULT_BYTES
    clipped, cut = truncated(text, limit)
    while 6 * len(clipped) > RESULT_JSON_BYTES and (
        (length := len(msgspec.json.encode(clipped))) > RESULT_JSON_BYTES
    ):
        limit = limit * RESULT_JSON_BYTES // length
        clipped, cut = truncated(text, limit)
    return clipped, cut


def truncated(text: str, limit: int) -> tuple[str, int]:
    """Return the text, or its head and tail in at most `limit` UTF-8 bytes, and how many bytes were left out.

    What cannot be UTF-8 (lone surrogates) is replaced by `?`.
    """
    if text.isascii() and len(text) <= limit:
        return text, 0
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode(), 0
    head = encoded[: limit // 2].decode(errors="ignore")
    tail = encoded[len(encoded) - limit // 2 :].decode(errors="ignore")
    return head + tail, len(encoded) - len(head.encode()) - len(tail.encode())
