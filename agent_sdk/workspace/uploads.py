"""Files that come into a workspace in parts: what has come of one whose bytes broke off waits for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from agent_sdk.protocol.errors import ConnectionLost, OpMismatch, TransferBroken
from agent_sdk.protocol.results import Transferred
from agent_sdk.workspace.atomic_file import AtomicFile
from agent_sdk.workspace.files import LocalFiles

KEPT_SECONDS = 600.0
KEPT = 32
"""More than that may not wait at the same time; the oldest gives way."""


class Uploads:
    """Files that come in parts. Nothing of them is to be seen before all has come and was verified."""

    def __init__(self, files: LocalFiles, *, seconds: float = KEPT_SECONDS) -> None:
        """Take the files they go to, and for how long a part waits."""
        self._files = files
        self._seconds = seconds
        self._waiting: dict[str, _Part] = {}
        self._coming: dict[str, asyncio.Task[object]] = {}
        self._leaving: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def size(self, op_id: str) -> int:
        """Return how many bytes of an upload wait for the rest."""
        return self._waiting[op_id].file.size if op_id in self._waiting else 0

    def give_way(self, op_id: str) -> bool:
        """Let go of the bytes that come for this upload just now, if any do: others will, over another connection."""
        if (task := self._coming.get(op_id)) is None:
            return False
        self._leaving.add(op_id)
        return task.cancel()

    async def receive(
        self,
        op_id: str,
        path: str,
        pieces: AsyncIterable[tuple[int, bytes]],
        digest: Callable[[], bytes],
        *,
        since: int,
        size: int | None,
        mode: int | None,
        unpack: bool,
    ) -> Transferred:
        """Write a file from pieces with their offsets, on behind what has come of it.

        Args:
            op_id: names the upload.
            path: of the file.
            pieces: what comes.
            digest: the SHA-256 of the whole, asked for when all has come.
            since: where the pieces begin; 0: anew.
            size: of the whole.
            mode: permission bits.
            unpack: it is an archive, for a folder.

        Raises:
            TransferBroken: it broke off, and what has come is kept; or what came is not what was sent.
        """
        if not since and op_id in self._waiting:
            self._drop(op_id)
        file = await self._take(op_id, path, mode, unpack)
        try:
            await self._append(op_id, file, pieces, since)
        except (ConnectionLost, TransferBroken) as exc:
            self._keep(op_id, path, mode, file)
            raise TransferBroken(f"it broke off after {file.size} bytes, which are kept: {exc}") from None
        except BaseException:
            await file.aclose()
            raise
        async with aclosing(file):
            return await file.commit(size=size, digest=digest())

    async def _append(
        self, op_id: str, file: AtomicFile, pieces: AsyncIterable[tuple[int, bytes]], since: int
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._coming[op_id] = task
        try:
            if since != file.size:
                raise TransferBroken(f"since: it goes on at {file.size} (got {since})")
            async for offset, data in pieces:
                if offset != file.size:
                    raise TransferBroken(f"bytes are missing at {file.size}")
                await file.write(data)
        except asyncio.CancelledError:
            if op_id not in self._leaving:
                raise
            task.uncancel()
            raise TransferBroken("another call goes on with it") from None
        finally:
            self._leaving.discard(op_id)
            del self._coming[op_id]

    async def close(self) -> None:
        """Remove what waits."""
        for op_id in tuple(self._waiting):
            self._drop(op_id)
        await asyncio.gather(*self._closing)

    async def _take(self, op_id: str, path: str, mode: int | None, unpack: bool) -> AtomicFile:
        if (part := self._waiting.pop(op_id, None)) is not None:
            if (part.path, part.mode) != (path, mode):
                self._waiting[op_id] = part
                raise OpMismatch(f"op_id {op_id} came before with other params", op_id=op_id)
            part.timer.cancel()
            return part.file
        return await self._files.open_atomic(path, mode, unpack=unpack)

    def _keep(self, op_id: str, path: str, mode: int | None, file: AtomicFile) -> None:
        timer = asyncio.get_running_loop().call_later(self._seconds, self._drop, op_id)
        self._waiting[op_id] = _Part(path, mode, file, timer)
        if len(self._waiting) > KEPT:
            self._drop(next(iter(self._waiting)))

    def _drop(self, op_id: str) -> None:
        part = self._waiting.pop(op_id)
        part.timer.cancel()
        closing = asyncio.create_task(part.file.aclose())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


@dataclass(frozen=True)
class _Part:
    """What has come of a file, and when that is given up."""

    path: str
    mode: int | None
    file: AtomicFile
    timer: asyncio.TimerHandle
