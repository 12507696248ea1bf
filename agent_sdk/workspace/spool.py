"""What one stream of a process said, kept by offset: the first 256 MiB in a file, after that the last 1 MiB.

Little output never touches the disk. More of it is written by a thread, a batch at a time, while
`full` asks the feeder to wait. Readers wait for changes, they never poll. When the disk is full, what
follows is treated as if the 256 MiB were over: counted exactly, its end kept.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable

from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.output import HEAD_BYTES, SPOOL_BYTES, TAIL_BYTES, Output

PENDING_BYTES = 4 << 20


class Spool:
    """What one stream of a process said. One loop uses it; only `_write` and `pread` run in threads."""

    def __init__(
        self,
        path: str,
        *,
        memory: int = HEAD_BYTES,
        capacity: int = SPOOL_BYTES,
        on_written: Callable[[int], None] | None = None,
    ) -> None:
        """Make an empty one.

        Args:
            path: of the file, which is made when there is more than `memory`.
            memory: bytes that need no file, at most 64 KiB.
            capacity: bytes that are kept from the start.
            on_written: called with how many more bytes of disk it takes.
        """
        self.path = path
        self.size = 0
        """Bytes that came in all, exactly."""
        self.on_room: Callable[[], None] | None = None
        """Called when `full` has become false."""
        self._memory = min(memory, HEAD_BYTES)
        self._capacity = capacity
        self._on_written = on_written
        self._head = bytearray()
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._written = 0
        self._fd = -1
        self._writing: asyncio.Future[int] | None = None
        self._ring = bytearray()
        self._sealed: tuple[int, int] | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._reads: set[asyncio.Future[bytes]] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether the disk is behind and the feeder had better wait."""
        return self._pending_bytes >= PENDING_BYTES

    @property
    def on_disk(self) -> int:
        """Bytes of disk it takes."""
        return self._written

    @property
    def has_file(self) -> bool:
        """Whether `path` exists or is about to."""
        return self._written > 0 or self._pending_bytes > 0

    @property
    def wrapped(self) -> bool:
        """Whether its end is kept in memory, because the middle is gone."""
        return bool(self._ring)

    def feed(self, data: bytes) -> None:
        """Append bytes without waiting; `full` asks the feeder to wait."""
        start, self.size = self.size, self.size + len(data)
        if len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        if start + len(data) > self._memory:
            if start <= self._memory and not self.has_file:
                # Everything so far is in the head: it opens the file.
                data, start = bytes(self._head[:start]) + data, 0
            self._store(data, start)
        self._wake()

    def _store(self, data: bytes, start: int) -> None:
        keep = max(0, self._capacity - start)
        if keep:
            self._pending.append(data[:keep])
            self._pending_bytes += min(keep, len(data))
            self._write_on()
        if keep < len(data):
            self._turn(data[keep:], start + keep)

    def _turn(self, data: bytes, start: int) -> None:
        """Put bytes into the ring; the byte at offset n of the stream lies at n modulo its size."""
        if not self._ring:
            self._ring = bytearray(TAIL_BYTES)
        if len(data) > TAIL_BYTES:
            start += len(data) - TAIL_BYTES
            data = data[-TAIL_BYTES:]
        at = start % TAIL_BYTES
        first = min(len(data), TAIL_BYTES - at)
        self._ring[at : at + first] = data[:first]
        self._ring[: len(data) - first] = data[first:]

    # --- the file ---

    def _write_on(self) -> None:
        if self._writing is None and self._pending and not self._closed:
            batch = tuple(self._pending)
            self._writing = asyncio.get_running_loop().run_in_executor(None, self._write, batch)
            self._writing.add_done_callback(lambda writing: self._wrote(writing, batch))

    def _write(self, batch: tuple[bytes, ...]) -> int:
        """Write a batch behind what is written. Runs in a thread. Returns how much of it went."""
        done = 0
        try:
            if self._fd < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._fd = os.open(self.path, flags, 0o600)
            view = memoryview(b"".join(batch) if len(batch) > 1 else batch[0])
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], self._written + done)
        except OSError:
            return done
        return done

    def _wrote(self, writing: asyncio.Future[int], batch: tuple[bytes, ...]) -> None:
        self._writing = None
        was_full = self.full
        done = 0 if writing.cancelled() else writing.result()
        size = sum(map(len, batch))
        self._written += done
        if self._on_written is not None:
            self._on_written(done)
        for _ in batch:
            self._pending.popleft()
        self._pending_bytes -= size
        if done < size:
            self._give_up(b"".join(batch)[done:])
        self._write_on()
        if was_full and not self.full and self.on_room is not None:
            self.on_room()
        self._wake()

    def _give_up(self, lost: bytes) -> None:
        """The disk takes no more: go on as if the capacity were reached here."""
        rest = b"".join((lost, *self._pending))
        ring_start = self._capacity
        self._pending.clear()
        self._pending_bytes = 0
        had_ring = bool(self._ring)
        self._capacity = self._written
        # What already is in the ring follows the rest; laying the rest first would overwrite it.
        kept = self._ring_bytes(max(ring_start, self.size - TAIL_BYTES)) if had_ring else b""
        self._turn(rest + kept, self.size - len(rest) - len(kept))

    def _ring_bytes(self, start: int) -> bytes:
        length = self.size - start
        at = start % TAIL_BYTES
        first = bytes(self._ring[at : at + length])
        return first + bytes(self._ring[: length - len(first)])

    async def settle(self, *, final: bool = False) -> int:
        """Bring the file up to date: the last 1 MiB goes behind the rest, after a line on what is missing.

        Returns how many bytes the file lacks.

        Args:
            final: nothing will be fed any more; memory is given back.
        """
        wanted = min(self.size, self._capacity)
        while self._writing is not None and self._written < wanted:
            await asyncio.wait((self._writing,))
            wanted = min(wanted, self._capacity)
        if not self._ring:
            return 0
        if self._fd < 0:
            return self.size
        first = self.first_kept(self._capacity)
        missing = first - self._capacity
        note = f"\n[... {missing} bytes left out ...]\n".encode() if missing else b""
        tail = self._ring_bytes(first)
        try:
            await in_thread(os.pwrite, self._fd, note + tail, self._capacity)
        except OSError:
            return self.size - self._capacity  # the disk is full: the memory stays the only place
        if final:
            self._sealed = (first, self._capacity + len(note))
            self._ring = bytearray()
        return missing

    # --- reading ---

    def first_kept(self, offset: int) -> int:
        """Return the offset of the first kept byte at or after `offset`."""
        if offset < self._capacity or offset < len(self._head):
            return offset
        return max(offset, self._capacity, self.size - TAIL_BYTES)

    async def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Return kept bytes from `offset` on with the offset they begin at; none: nothing is there yet.

        May return less than `limit` (at most 1 MiB) although there is more.
        """
        offset = self.first_kept(offset)
        if self._closed:
            return offset, b""
        if offset < len(self._head):
            return offset, bytes(self._head[offset : offset + limit])
        if offset < self._written:
            return offset, await self._pread(min(limit, self._written - offset), offset)
        if offset < self._written + self._pending_bytes:
            return offset, self._read_pending(offset - self._written, limit)
        if offset < self.size and self._sealed is not None:
            first, place = self._sealed
            return offset, await self._pread(min(limit, self.size - offset), place + offset - first)
        if offset < self.size:
            return offset, self._ring_bytes(offset)[:limit]
        return offset, b""

    async def _pread(self, limit: int, place: int) -> bytes:
        """Read the file in a thread; `close` waits for it, also when the reader was cancelled."""
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(None, os.pread, self._fd, min(limit, TAIL_BYTES), place)
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)
        return await asyncio.shield(reading)

    def _read_pending(self, skip: int, limit: int) -> bytes:
        for chunk in self._pending:
            if skip < len(chunk):
                return chunk[skip : skip + limit]
            skip -= len(chunk)
        return b""

    async def beginning(self, limit: int) -> bytes:
        """Return the first `limit` bytes of what came so far."""
        return await self._collect(0, min(self.size, limit, self._capacity))

    async def output(self, start: int = 0) -> Output:
        """Return what came so far, from `start` on, as head and tail."""
        end = self.size
        head = await self._collect(start, min(end, start + HEAD_BYTES))
        if end - start <= len(head):
            return Output(head=head, size=end - start)
        tail = await self._collect(max(start + len(head), end - TAIL_BYTES), end)
        return Output(head=head, tail=tail, size=end - start)

    async def _collect(self, start: int, end: int) -> bytes:
        """Return the kept bytes from `start` to `end`; starts later where the ring has moved on."""
        parts: list[bytes] = []
        position = start
        while position < end:
            found, data = await self.read(position, min(end - position, TAIL_BYTES))
            if found != position:
                parts.clear()
            if not data or found >= end:
                break
            parts.append(data[: end - found])
            position = found + len(parts[-1])
        return b"".join(parts)

    def changed(self) -> asyncio.Future[None]:
        """Return a future that is done when more came or more room is there, and when this is closed."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)
        return waiter

    def _wake(self) -> None:
        for waiter in tuple(self._waiters):
            if not waiter.done():
                waiter.set_result(None)

    async def close(self) -> None:
        """Stop writing and remove the file; reads find nothing from now on."""
        if self._closed:
            return
        self._closed = True
        busy = {*self._reads, *((self._writing,) if self._writing is not None else ())}
        if busy:
            await asyncio.wait(busy)
        self._wake()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            os.unlink(self.path)
        self._pending.clear()
        self._pending_bytes = self._written = 0
        self._ring = bytearray()
