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

from agent_sdk.protocol.errors import ConnectionLost, PathExists, WorkspaceUnavailable
from agent_sdk.rpc.pipe import Pipe, lost, wake

FRAME_BYTES = 1 << 20
PATH_BYTES = 107
CLOSE_SECONDS = 5.0
_HELD_BYTES = 256 << 10
_TEXT, _BINARY, _CLOSE = 1, 2, 8
_head = struct.Struct(">IB")
_code = struct.Struct(">H")


class UnixPipe(asyncio.Protocol):
    """See Pipe. Reading pauses while more than 256 KiB wait to be received."""

    def __init__(self, frame_bytes: int, on_made: Callable[[UnixPipe], None] | None = None) -> None:
        self._frame_bytes = frame_bytes
        self._on_made = on_made
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
        """See Pipe."""
        if self._lost is not None:
            raise self._lost
        self._write(_TEXT if text else _BINARY, frame)
        if self._room is not None:
            await asyncio.shield(self._room)

    async def receive(self) -> tuple[bytes, bool]:
        """See Pipe."""
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
        """See Pipe. What cannot be flushed within 5 s is dropped."""
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
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._on_made is not None:
            self._on_made(self)

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
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    def made(pipe: UnixPipe) -> None:
        task = loop.create_task(_serve(pipe, on_pipe))
        running.add(task)
        task.add_done_callback(running.discard)

    listening = _listening_socket(path)
    server = await loop.create_unix_server(lambda: UnixPipe(frame_bytes, made), sock=listening)
    try:
        yield
    finally:
        server.close()
        with suppress(FileNotFoundError):
            os.unlink(path)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _serve(pipe: UnixPipe, on_pipe: Callable[[Pipe], Awaitable[None]]) -> None:
    try:
        await on_pipe(pipe)
    except ConnectionLost:
        pass
    except Exception as exc:  # noqa: BLE001 - the boundary of the connection's task
        asyncio.get_running_loop().call_exception_handler(
            {"message": "serving a Unix connection failed", "exception": exc}
        )
    finally:
        await pipe.close()


def _listening_socket(path: str) -> socket.socket:
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
