"""A network connection as aiohttp sees it, with what aiohttp leaves out: how many there may be, JSON
errors for requests that are no HTTP, and a look at WebSocket frames before they are parsed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from agent_sdk.protocol.errors import Overloaded, to_wire
from agent_server.answers import http_error
from agent_server.frames import POLICY, FrameWatch, Violation
from agent_server.metrics import Metrics

RETRY_AFTER_MS = 1000
STRANGER_BYTES = 64 << 10
"""What a WebSocket may send before it has shown the key: enough for `initialize`, too little to fill memory."""


class Crowd:
    """Who is connected: everybody, and the strangers (who have not shown a key) of each address."""

    def __init__(self, limit: int, strangers: int, metrics: Metrics) -> None:
        self._limit = limit
        self._strangers_limit = strangers
        self._all = 0
        self._strangers: Counter[str] = Counter()
        self._metrics = metrics

    def arrive(self, address: str) -> Overloaded | None:
        """Count a new connection, or say why it has to go."""
        if self._all >= self._limit:
            return self._refusal("connections", self._limit)
        if self._strangers[address] >= self._strangers_limit:
            return self._refusal("connections without a key from one address", self._strangers_limit)
        self._all += 1
        self._strangers[address] += 1
        self._metrics.connections.set(self._all)
        return None

    def recognise(self, address: str) -> None:
        """One of this address has shown the key."""
        self._strangers -= Counter([address])

    def leave(self, address: str, *, stranger: bool) -> None:
        """One of this address is gone."""
        self._all -= 1
        self._metrics.connections.set(self._all)
        if stranger:
            self.recognise(address)

    def _refusal(self, what: str, limit: int) -> Overloaded:
        self._metrics.refused.labels("overloaded").inc()
        return Overloaded(f"limit {limit} {what}", limit=limit, retry_after_ms=RETRY_AFTER_MS)


class Connection(web.RequestHandler):
    """One connection. What aiohttp calls `request.protocol` is one of these."""

    def __init__(self, server: web.Server, crowd: Crowd, *, longest_message: int, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.address = ""
        self.violation: asyncio.Future[Violation] | None = None
        """Done when the client has broken the rules of WebSocket; made when it becomes one."""
        self._crowd = crowd
        self._longest_message = longest_message
        self.is_stranger = True
        """Whether it has not shown the key yet."""
        self._refused = False
        self._tcp: asyncio.Transport | None = None

    def recognise(self) -> None:
        """It has shown the key."""
        if self.is_stranger and not self._refused:
            self.is_stranger = False
            self._crowd.recognise(self.address)

    def abort(self) -> None:
        """Give up what has not been sent yet, unlike `force_close`."""
        if self._tcp is not None:
            self._tcp.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._tcp = cast(asyncio.Transport, transport)  # other event loops have classes of their own
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else "local"
        refusal = self._crowd.arrive(self.address)
        if refusal is None:
            super().connection_made(transport)
            return
        self._refused = True
        self._tcp.write(_raw_answer(refusal))
        self._tcp.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        self._tcp = None
        if not self._refused:
            self._crowd.leave(self.address, stranger=self.is_stranger)
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self._refused:
            super().data_received(data)

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        """Become a WebSocket: from here on every byte is looked at before aiohttp's parser gets it."""
        self.violation = asyncio.get_running_loop().create_future()
        watched: Any = _Watched(parser, self, self._longest_message, self.violation)
        super().set_parser(watched, data_received_cb)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, or what our own code did not catch. Nothing of the exception is told."""
        if not isinstance(exc, ConnectionError):
            self.logger.error("request refused", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; only the end of the connection can tell")
        if status == 400:
            sentence = "the request is no valid HTTP/1.1"
            answer = http_error(431 if isinstance(exc, LineTooLong) else 400, sentence)
        else:
            answer = http_error(status, "internal error")
        answer.force_close()
        return answer


class _Watched:
    """aiohttp's WebSocket parser behind a FrameWatch."""

    def __init__(
        self, parser: Any, connection: Connection, limit: int, violation: asyncio.Future[Violation]
    ) -> None:
        self._parser = parser
        self._connection = connection
        self._watch = FrameWatch(limit)
        self._violation = violation
        self._now = asyncio.get_running_loop().time
        self._from_stranger = 0

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        if self._violation.done():
            return False, b""
        violation = self._watch.look(data, self._now())
        if violation is None and self._connection.is_stranger:
            self._from_stranger += len(data)
            if self._from_stranger > STRANGER_BYTES:
                violation = Violation(POLICY, f"limit {STRANGER_BYTES} bytes before initialize")
        if violation is None:
            eof, rest = self._parser.feed_data(data)
            return eof, rest
        self._violation.set_result(violation)
        self._parser.feed_data(data[: violation.at])
        return False, b""

    def feed_eof(self) -> None:
        self._parser.feed_eof()


def _raw_answer(error: Overloaded) -> bytes:
    body = msgspec.json.encode({"error": to_wire(error)})
    head = (
        "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {RETRY_AFTER_MS // 1000}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
