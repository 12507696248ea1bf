"""Files of containers that do not run, through the engine.

Nothing is written but the owners and rights of what is there, before anything of the image could put a link in the way.
"""

from __future__ import annotations

import asyncio
import base64
import io
import posixpath
import tarfile
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from agent_sdk.protocol.errors import EngineUnavailable, NotFound
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.docker.engine_connection import ANSWER_SECONDS, EngineConnection

_STAT = "X-Docker-Container-Path-Stat"
_NO_FILE = 0x8F280000
"""The bits of a Go file mode that say that it is something else than a regular file."""
_GIVEN_BYTES = 16 << 20
_OF_FOLDERS, _OF_FILES, _SETGID = 0o2770, 0o660, 0o2000
"""What a group may do where something is given to it; what is made in a folder with SETGID is the group's, too."""
_AROUND = 64 << 10
"""Bytes that an archive of one file has besides it, at most."""


async def read_file(connection: EngineConnection, id: str, path: str, most: int) -> tuple[str, bytes]:
    """Return where a path of a container leads to, and its content."""
    target, content = await _read(connection, id, path, most)
    if target == path:
        return path, content
    with suppress(NotFound):  # all links of the way are resolved in it
        content = (await _read(connection, id, target, most))[1]
    return target, content


async def give_to_group(connection: EngineConnection, id: str, folder: str, group: int) -> None:
    """Let a group write what is in a folder of a container."""
    what = f"give {folder} of a container to the group {group}"
    async with connection.stream("GET", f"containers/{id}/archive", {"path": folder}, what=what) as response:
        content = await _whole(response.content, _GIVEN_BYTES)
    given = await in_thread(_given, content, group)
    if given:
        async with connection.bounded(what):
            container = connection.docker.containers.container(id)
            await container.put_archive(posixpath.dirname(folder), given)


def _given(content: bytes, group: int) -> bytes:
    """The archive as it is to be, the folder itself first; empty: nothing has to be done. Blocks."""
    whole, given = len(content) <= _GIVEN_BYTES, io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as present,
        tarfile.open(fileobj=given, mode="w") as wanted,
    ):
        for number, entry in enumerate(present):
            if number == 0 and (entry.gid, entry.mode & _SETGID) == (group, _SETGID):
                return b""
            entry.gid, entry.gname = group, ""
            entry.pax_headers = {name: value for name, value in entry.pax_headers.items() if name != "gid"}
            if not entry.issym():
                entry.mode |= _OF_FOLDERS if entry.isdir() else _OF_FILES
            wanted.addfile(entry, present.extractfile(entry) if entry.isreg() else None)
            if not whole:
                break
    return given.getvalue()


async def _read(connection: EngineConnection, id: str, path: str, most: int) -> tuple[str, bytes]:
    what = f"read {path} of a container"
    async with connection.stream("GET", f"containers/{id}/archive", {"path": path}, what=what) as response:
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
