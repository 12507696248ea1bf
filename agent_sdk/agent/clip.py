"""Cutting long text: in its middle, where the head says what it is and the tail how it ended, or at its end."""

from __future__ import annotations

import msgspec

RESULT_BYTES = 32 << 20
"""UTF-8 bytes of a tool result that go into the log."""
RESULT_JSON_BYTES = 56 << 20
"""The same as JSON, where a control character takes six bytes: an event has to fit into one message (64 MiB)."""
MODEL_CHARS = 30_000
"""Characters of a tool result that the model sees."""
ARGUMENT_BYTES = 1 << 20
ELLIPSIS = "…"
"""Stands where a text was cut at its end: what may be the beginning of a secret before it is not shown."""


def shortened(text: str, limit: int) -> str:
    """Return the text, or its first `limit - 1` characters and an ELLIPSIS."""
    return text if len(text) <= limit else text[: limit - 1] + ELLIPSIS


def clip_chars(text: str, limit: int, cut: int = 0) -> str:
    """Return the text, or `limit` characters of it and a line that says how many bytes are left out.

    Args:
        cut: bytes that are left out of `text` already, in its middle.
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    left_out = cut + len(text[half : len(text) - half].encode(errors="replace"))
    return f"{text[:half]}\n[... {left_out} bytes left out ...]\n{text[len(text) - half :]}"


def clip_result(text: str) -> tuple[str, int]:
    """Return what of a tool's result goes into the log, and how many of its UTF-8 bytes were left out."""
    limit = RESULT_BYTES
    clipped, cut = clip_bytes(text, limit)
    while 6 * len(clipped) > RESULT_JSON_BYTES and (
        (length := len(msgspec.json.encode(clipped))) > RESULT_JSON_BYTES
    ):
        limit = limit * RESULT_JSON_BYTES // length
        clipped, cut = clip_bytes(text, limit)
    return clipped, cut


def clip_bytes(text: str, limit: int) -> tuple[str, int]:
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
