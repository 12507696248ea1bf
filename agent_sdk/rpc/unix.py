"""Pipes over a Unix socket: the transport of a box. Needs nothing but asyncio.

Each frame is preceded by its length (uint32, big endian) and its kind (one byte: 1 text, 2 binary,
8 close). A close frame holds the code (uint16) and the reason (UTF-8).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import cast

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import ConnectionLost, PathExists, WorkspaceUnavailable
from agent_sdk.rpc.pipe import Pipe, lost, wake

FRAME_BYTES = 1 << 20
PATH_BYTES = 107
BACKLOG = 128
CLOSE_SECONDS = 5.0
RETRY_SECONDS = 1.0
_HELD_BYTES = 256 << 10
_TEXT, _BINARY, _CLOSE = 1, 2, 8
_head = struct.Struct(">IB")
_code = struct.Struct(">H")


class UnixPipe(asyncio.Protocol, Pipe):
    """A Pipe over a Unix socket. Reading pauses while more than 256 KiB wait to be received."""

    def __init__(self, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()
        self._needed = 0
        self._frames: deque[tuple[bytes, bool]] = deque()
        self._held = 0
        self._reading = True
        self._lost: ConnectionLost | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def send(self, frame: bytes | bytearray | memoryview, *, text: bool) -> None:
        if self._lost is not None:
            raise self._lost
        self._write(_TEXT if text else _BINARY, frame)
        if self._room is not None:
            await asyncio.shield(self._room)

    def send_now(self, frame: bytes, *, text: bool) -> bool:
        if self._lost is not None or self._room is not None:
            return False
        self._write(_TEXT if text else _BINARY, frame)
        return True

    async def receive(self) -> tuple[bytes, bool]:
        while not self._frames:
            if self._lost is not None:
                raise self._lost
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        frame, text = self._frames.popleft()
        self._held -= len(frame)
        if not self._reading and self._held <= _HELD_BYTES // 2:
            self._reading = True
            if self._transport is not None:
                self._transport.resume_reading()
        return frame, text

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection. What cannot be flushed within 5 s is dropped."""
        transport = self._transport
        if self._lost is None and transport is not None:
            self._write(_CLOSE, _code.pack(code) + reason.encode()[:123])
            self._end(lost(code, reason))
        self._frames.clear()
        if transport is None:
            return
        transport.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.shield(self._gone)
        except TimeoutError:
            transport.abort()
            await self._gone
        except asyncio.CancelledError:
            transport.abort()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        # Not asserted: the transports of other event loops are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        if self._lost is not None:
            return
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest.clear()
        self._cut(data)
        if self._reading and self._held > _HELD_BYTES and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self._transport = None
        self._end(lost(1006, str(exc) if exc else "the other end is gone"))
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        """Part of asyncio.Protocol."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Part of asyncio.Protocol."""
        wake(self._room)
        self._room = None

    def _write(self, kind: int, frame: bytes | bytearray | memoryview) -> None:
        assert self._transport is not None
        self._transport.write(b"".join((_head.pack(len(frame), kind), frame)))

    def _cut(self, data: bytes) -> None:
        """Take the whole frames off `data`, keep the rest."""
        start, size = 0, len(data)
        self._needed = 0
        while size - start >= _head.size:
            length, kind = _head.unpack_from(data, start)
            if length > self._frame_bytes:
                return self._refuse(1009, f"limit {self._frame_bytes}")
            end = start + _head.size + length
            if end > size:
                self._needed = end - start
                break
            frame = data[start + _head.size : end]
            start = end
            if kind == _CLOSE:
                return self._closed_by_the_other(frame)
            if kind not in (_TEXT, _BINARY):
                return self._refuse(1002, f"unknown kind {kind}")
            self._frames.append((frame, kind == _TEXT))
            self._held += length
            wake(self._arrived)
        self._rest += memoryview(data)[start:]
        return None

    def _closed_by_the_other(self, frame: bytes) -> None:
        code = _code.unpack_from(frame)[0] if len(frame) >= _code.size else 1005
        self._end(lost(code, frame[_code.size :].decode(errors="replace")))
        if self._transport is not None:
            self._transport.close()

    def _refuse(self, code: int, reason: str) -> None:
        self._write(_CLOSE, _code.pack(code) + reason.encode())
        self._end(lost(code, reason))
        if self._transport is not None:
            self._transport.close()

    def _end(self, reason: ConnectionLost) -> None:
        self._lost = self._lost or reason
        wake(self._arrived)
        wake(self._room)


async def connect_unix(path: str, frame_bytes: int = FRAME_BYTES) -> Pipe:
    """Connect to the Unix socket at `path`.

    Raises:
        WorkspaceUnavailable: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    try:
        with _short(path) as address:
            _, pipe = await loop.create_unix_connection(lambda: UnixPipe(frame_bytes), address)
    except OSError as exc:
        raise WorkspaceUnavailable(f"cannot connect to {path}: {exc.strerror or exc}") from None
    return pipe


@asynccontextmanager
async def serve_unix(
    path: str, on_pipe: Callable[[Pipe], Awaitable[None]], frame_bytes: int = FRAME_BYTES
) -> AsyncIterator[None]:
    """Listen at `path` (mode 0600) and run `on_pipe` for each connection; the pipe is closed when it returns.

    Leaving removes the socket, cancels what runs for connections and waits for it. A socket that a
    dead process left behind is replaced.

    Raises:
        PathExists: somebody listens there, or it is not a socket.
        WorkspaceUnavailable: the socket cannot be made.
    """
    async with serve_socket(listen_unix(path), on_pipe, frame_bytes):
        try:
            yield
        finally:
            with suppress(FileNotFoundError, PermissionError):  # its folder may have been closed meanwhile
                os.unlink(path)


@asynccontextmanager
async def serve_socket(
    listening: socket.socket, on_pipe: Callable[[Pipe], Awaitable[None]], frame_bytes: int = FRAME_BYTES
) -> AsyncIterator[None]:
    """Like `serve_unix`, on a socket that somebody else has made. Leaving closes it."""
    async with _Listener(listening, on_pipe, frame_bytes):
        yield


class _Listener:
    """Accepts connections. asyncio's own server can lose one that comes in the moment it is closed."""

    def __init__(
        self, listening: socket.socket, on_pipe: Callable[[Pipe], Awaitable[None]], frame_bytes: int
    ) -> None:
        self._listening = listening
        self._on_pipe = on_pipe
        self._frame_bytes = frame_bytes
        self._loop = asyncio.get_running_loop()
        self._running: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        self._listen()

    async def __aexit__(self, *_: object) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()
        await cancel_and_wait(*self._running)

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as exc:  # out of descriptors, most likely; the connection stays in the backlog
            self._report("accepting a Unix connection failed", exc)
            self._loop.remove_reader(self._listening)
            self._pause = self._loop.call_later(RETRY_SECONDS, self._listen)
            return
        task = self._loop.create_task(self._serve(accepted))
        self._running.add(task)
        task.add_done_callback(partial(self._served, accepted))

    def _served(self, accepted: socket.socket, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        accepted.close()  # for a task that was cancelled before it began

    async def _serve(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        _, pipe = await self._loop.connect_accepted_socket(lambda: UnixPipe(self._frame_bytes), accepted)
        try:
            await self._on_pipe(pipe)
        except ConnectionLost:
            pass
        except Exception as exc:  # noqa: BLE001 - the boundary of the connection's task
            self._report("serving a Unix connection failed", exc)
        finally:
            await pipe.close()

    def _report(self, message: str, exc: Exception) -> None:
        self._loop.call_exception_handler({"message": message, "exception": exc})


def listen_unix(path: str) -> socket.socket:
    """Return a socket that listens at `path` (mode 0600), for `serve_socket`. Raises what `serve_unix` does."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as address:
            try:
                made.bind(address)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                _remove_if_dead(path, address)
                made.bind(address)
        os.chmod(path, 0o600)  # before listen(): nobody can connect in between
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError as exc:
        made.close()
        if isinstance(exc, PathExists):
            raise
        raise WorkspaceUnavailable(f"cannot listen at {path}: {exc.strerror or exc}") from None
    return made


def _remove_if_dead(path: str, address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            if not os.path.isfile(path):
                return os.unlink(path)
    raise PathExists(f"{path} is in use", path=path)


@contextmanager
def _short(path: str) -> Iterator[str]:
    """A name of at most 107 bytes for `path`: the kernel takes no longer address."""
    if len(os.fsencode(path)) <= PATH_BYTES:
        yield path
        return
    folder, name = os.path.split(path)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
