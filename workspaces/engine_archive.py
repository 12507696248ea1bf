"""Files of containers, read through the engine, also of those that do not run."""

from __future__ import annotations

import asyncio
import base64
import io
import tarfile
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from agent_sdk.protocol.errors import EngineUnavailable, NotFound
from workspaces.engine_api import ANSWER_SECONDS, EngineApi

_STAT = "X-Docker-Container-Path-Stat"
_NO_FILE = 0x8F280000
"""The bits of a Go file mode that say that it is something else than a regular file."""
_AROUND = 64 << 10
"""Bytes that an archive of one file has besides it, at most."""


async def read_file(api: EngineApi, archive: str, path: str, most: int) -> tuple[str, bytes]:
    """See Engine.read_file; `archive`: the path in the engine's API."""
    target, content = await _read(api, archive, path, most)
    if target == path:
        return path, content
    with suppress(NotFound):  # all links of the way are resolved in it
        content = (await _read(api, archive, target, most))[1]
    return target, content


async def _read(api: EngineApi, archive: str, path: str, most: int) -> tuple[str, bytes]:
    what = f"read {path} of a container"
    async with api.answer("GET", archive, what=what, params={"path": path}) as response:
        try:
            about: dict[str, Any] = msgspec.json.decode(base64.b64decode(response.headers[_STAT]))
            target, mode, size = str(about["linkTarget"]), int(about["mode"]), int(about["size"])
        except (LookupError, ValueError, TypeError) as exc:
            raise EngineUnavailable(
                f"the engine could not {what}: its answer makes no sense ({exc})", phase="create"
            ) from None
        if (target and target != path) or mode & _NO_FILE or not size <= most:
            return target or path, b""
        return path, _only_file(await _whole(response.content, size + _AROUND))


async def _whole(content: aiohttp.StreamReader, most: int) -> bytes:
    parts, got = [], 0
    async with asyncio.timeout(ANSWER_SECONDS):
        while got <= most and (part := await content.readany()):
            parts.append(part)
            got += len(part)
    return b"".join(parts)


def _only_file(archive: bytes) -> bytes:
    with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for entry in opened:
            if (file := opened.extractfile(entry)) is not None:
                return file.read()
    return b""
