"""The output of containers, line by line."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from urllib.parse import quote

import aiohttp

from agent_sdk.protocol.errors import AgentServerError
from workspaces.backend.docker.engine_api import EngineApi

LONGEST_LINE = 64 << 10
"""Bytes; a longer one comes in pieces."""
MOST = 64 << 10
"""Bytes of last lines."""
SECONDS = 10.0
_HEADER = struct.Struct(">BxxxL")


async def last_lines(api: EngineApi, id: str, lines: int) -> str:
    """Return the end of a container's output; empty when it cannot be had: whoever asks has an error to tell."""
    found = ""
    try:
        async with asyncio.timeout(SECONDS):
            async for line in _read(api, id, follow="0", tail=str(lines)):
                found = f"{found}{line}\n"[-MOST:]
    except (AgentServerError, TimeoutError):
        pass
    return found.rstrip("\n")


def follow(api: EngineApi, id: str, tail: str = "all") -> AsyncIterator[str]:
    """See Engine.follow_logs."""
    return _read(api, id, follow="1", tail=tail)


async def _read(api: EngineApi, id: str, **params: str) -> AsyncIterator[str]:
    path = f"containers/{quote(id, safe='')}/logs"
    what = f"show the output of the container {id[:12]}"
    params = {"stdout": "1", "stderr": "1", **params}
    async with api.stream("GET", path, what=what, params=params) as stream:
        rest = b""
        async for piece in _pieces(stream):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield _text(line)
            if len(rest) > LONGEST_LINE:
                yield _text(rest)
                rest = b""
        if rest:
            yield _text(rest)


async def _pieces(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """What was written, without the headers that say whether it was standard output or error."""
    try:
        while True:
            _, length = _HEADER.unpack(await stream.readexactly(_HEADER.size))
            while length:
                piece = await stream.read(min(length, LONGEST_LINE))
                if not piece:
                    return
                length -= len(piece)
                yield piece
    except asyncio.IncompleteReadError:
        return


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace")
