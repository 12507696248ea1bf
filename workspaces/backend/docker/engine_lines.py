"""Lines of an answer that comes bit by bit."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp

LONGEST = 1 << 20
"""Bytes. An event has all labels of its container, and an image may bring any number of them."""


async def lines_of(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream, whole ones only; one that is too long comes cut to nothing."""
    rest, too_long = b"", False
    async for piece in stream.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield b"" if too_long or len(line) > LONGEST else line
            too_long = False
        if len(rest) > LONGEST:
            rest, too_long = b"", True
