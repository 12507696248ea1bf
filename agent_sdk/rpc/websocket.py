"""A Pipe over an aiohttp WebSocket, either end of it.

Open the socket with `decode_text=False`, `compress` off, `autoping` on and `max_msg_size` one more
than the longest frame (aiohttp refuses messages that reach its limit).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol

from aiohttp import ClientError, WebSocketError, WSMsgType

from agent_sdk.protocol.errors import ConnectionLost
from agent_sdk.rpc.pipe import Pipe, lost

CLOSE_SECONDS = 5.0
REASON_BYTES = 123


class WebSocket(Protocol):
    """What aiohttp's ClientWebSocketResponse and web.WebSocketResponse have in common."""

    @property
    def close_code(self) -> int | None:
        """The code it was closed with."""
        ...

    def exception(self) -> BaseException | None:
        """What broke it."""
        ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Facts about the transport."""
        ...

    def send_frame(self, message: bytes, opcode: WSMsgType) -> Coroutine[Any, Any, None]:
        """Send a frame."""
        ...

    async def receive(self) -> Any:
        """The next message."""
        ...

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Close."""
        ...


class WebSocketPipe(Pipe):
    """A Pipe over an aiohttp WebSocket."""

    def __init__(
        self,
        ws: WebSocket,
        *,
        heartbeat: float | None = None,
        patience: float = CLOSE_SECONDS,
        linger: float = 0.0,
    ) -> None:
        """Take over an open WebSocket.

        Args:
            heartbeat: the seconds of silence after which the other end asks whether this one is alive. Half of
                that without a word, and it says so unasked: on a thin line the question may be stuck behind
                bytes that move, and the answer with it.
            patience: seconds for the other end to agree to a close.
            linger: seconds for which what was on its way, the close frame too, stays there for an other end
                that did not agree; nobody waits for that.
        """
        self._ws = ws
        self._patience = patience
        self._linger = linger
        self._lost: ConnectionLost | None = None
        self._silent = 0.0 if heartbeat is None else heartbeat / 2
        self._full: asyncio.Future[None] | None = None
        """Done when there is room for frames again; None: there is."""
        self._has_spoken = False
        self._speaking: asyncio.Task[None] | None = None
        self._unasked: asyncio.TimerHandle | None = None
        self._wait_to_speak()

    async def send(self, frame: bytes | bytearray | memoryview, *, text: bool) -> None:
        if self._full is not None:
            await asyncio.wait((self._full,))
        if self._lost is not None:
            raise self._lost
        self._has_spoken = True
        try:
            await self._ws.send_frame(frame, WSMsgType.TEXT if text else WSMsgType.BINARY)  # type: ignore[arg-type]
        except (ClientError, ConnectionError) as exc:
            raise self._end(1006, str(exc)) from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise self._end(1006, "closed while sending") from None

    def send_now(self, frame: bytes, *, text: bool) -> bool:
        if self._lost is not None or self._full is not None:
            return False
        # aiohttp hands a frame to the transport before it waits for anything, and then for room alone.
        sending = self._ws.send_frame(frame, WSMsgType.TEXT if text else WSMsgType.BINARY)
        try:
            self._full = sending.send(None)
            self._full.add_done_callback(self._has_room)
            sending.close()
        except StopIteration:
            pass
        except (ClientError, ConnectionError):
            return False
        self._has_spoken = True
        return True

    def _has_room(self, full: asyncio.Future[None]) -> None:
        self._full = None
        if not full.cancelled():
            full.exception()  # whoever sends next hears of it

    async def receive(self) -> tuple[bytes, bool]:
        """Return the next frame, and whether it is text; one that is not UTF-8 ends the connection with 1007."""
        if self._lost is not None:
            raise self._lost
        try:
            message = await self._ws.receive()
        except (ClientError, ConnectionError) as exc:  # e.g. while answering a ping
            raise self._end(1006, str(exc)) from None
        if message.type is WSMsgType.BINARY:
            return message.data, False
        if message.type is WSMsgType.TEXT:
            data = message.data
            return data if isinstance(data, bytes) and data.isascii() else await self._text(data), True
        if message.type is WSMsgType.CLOSE:
            raise self._end(message.data or 1005, message.extra or "")
        if isinstance(message.data, WebSocketError):
            raise self._end(message.data.code, str(message.data))
        broken = self._ws.exception()
        raise self._end(self._ws.close_code or 1006, "" if broken is None else str(broken))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection. A socket that does not agree in time is shut down, after it has lingered."""
        self._end(code, reason)
        transport = self._ws.get_extra_info("socket")
        try:
            async with asyncio.timeout(self._patience):
                await self._ws.close(code=code, message=reason.encode()[:REASON_BYTES])
        except (TimeoutError, ClientError, ConnectionError):
            self._let_linger(transport)
        except asyncio.CancelledError:
            if _is_cancelled():
                _shut_down(transport)
                raise
            self._let_linger(transport)

    def _wait_to_speak(self) -> None:
        if self._silent and self._lost is None:
            self._unasked = asyncio.get_running_loop().call_later(self._silent, self._speak)

    def _speak(self) -> None:
        if not self._has_spoken and (self._speaking is None or self._speaking.done()):
            self._speaking = asyncio.create_task(self._pong())
        self._has_spoken = False
        self._wait_to_speak()

    async def _pong(self) -> None:
        with suppress(ClientError, ConnectionError):  # whoever sends or receives next hears of it
            await self._ws.send_frame(b"", WSMsgType.PONG)

    def _let_linger(self, transport: Any) -> None:
        if self._linger:
            asyncio.get_running_loop().call_later(self._linger, _shut_down, transport)
        else:
            _shut_down(transport)

    async def _text(self, data: bytes | str) -> bytes:
        if isinstance(data, str):
            return data.encode()
        try:
            data.decode()
        except UnicodeDecodeError:
            error = self._end(1007, "text that is not UTF-8")
            await self._ws.close(code=1007, message=b"text that is not UTF-8")
            raise error from None
        return data

    def _end(self, code: int, reason: str) -> ConnectionLost:
        if self._lost is None:
            self._lost = lost(code, reason)
            if self._unasked is not None:
                self._unasked.cancel()
            if self._speaking is not None:
                self._speaking.cancel()
        return self._lost


def _is_cancelled() -> bool:
    """Whether a CancelledError is ours: in aiohttp all who wait for room share one future, so cancelling one of
    them cancels the others.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _shut_down(transport: Any) -> None:
    """End a connection whose buffers are full: no transport of aiohttp can be aborted from outside."""
    if transport is None or transport.fileno() < 0:
        return
    with suppress(OSError), socket.socket(fileno=os.dup(transport.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)
