"""A network connection as aiohttp sees it, with what aiohttp leaves out: whom it is from, how many there may be, JSON
errors for requests that are no HTTP, and a look at the headers of WebSocket frames before aiohttp parses them.

aiohttp 3.14 refuses reserved bits, unknown opcodes, control frames that are fragmented or too long, and continuations
of nothing. It accepts unmasked frames from clients, lengths that are not minimal, any number of fragments (empty ones
cost no bytes of its limit) and of control frames; what is too long for it hears no limit.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from msgspec import Struct

from agent_sdk.protocol.errors import Overloaded, to_wire
from agent_server.config.sources import Network, ip_address
from agent_server.http.errors import http_error
from agent_server.metrics import Metrics

RETRY_AFTER_MS = 1000
CLOSE = 8
"""The first opcode of control frames."""
LONGEST_HEADER = 14
FRAGMENTS = 4096
CONTROLS_PER_SECOND = 100
PROTOCOL_ERROR = 1002
POLICY = 1008
TOO_BIG = 1009
CLOSE_UNAUTHORISED, CLOSE_LIMIT = 4401, 4429
# `2001:db8::1`, `[2001:db8::1]:443`, `192.0.2.1`, `192.0.2.1:443`
_FORWARDED = re.compile(r"\[(?P<six>[^\]]+)\](?::\d+)?|(?P<four>[0-9.]+):\d+|(?P<bare>[^\[\]]+)")
LONGEST_FORWARDED = 4096
STRANGER_BYTES = 64 << 10
"""What a WebSocket may send before it has shown the key: enough for `initialize`, too little to fill memory."""


class ProxyRules:
    """Which proxies are believed about whom they speak for."""

    def __init__(self, trusted: Sequence[Network] = ()) -> None:
        """Take their addresses and networks.

        X-Forwarded-For counts only as far as they wrote it themselves: from the right, the first address that is none
        of theirs.
        """
        self._networks = trusted

    def trusts(self, address: str) -> bool:
        """Return whether it is one of them."""
        parsed = _plain(address) if self._networks else None
        return parsed is not None and any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded: Sequence[str]) -> str:
        """Return for whom a trusted proxy speaks.

        Args:
            peer: its address.
            forwarded: all values of X-Forwarded-For.
        """
        client = peer
        for entry in reversed(",".join(forwarded)[-LONGEST_FORWARDED:].split(",")):
            found = _FORWARDED.fullmatch(entry.strip())
            parsed = _plain(found["six"] or found["four"] or found["bare"]) if found else None
            if parsed is None:
                break  # whoever wrote that is not to be believed any further
            client = str(parsed)
            if not self.trusts(client):
                break
        return client


def network_of(address: str) -> str:
    """Return what counts as one: all of the loopback, the network of an IPv6 customer (/64), an IPv4 address."""
    parsed = _plain(address)
    if parsed is None:
        return address
    if parsed.is_loopback:
        return "loopback"
    if isinstance(parsed, IPv6Address):
        return str(ip_network((parsed, 64), strict=False))
    return str(parsed)


def _plain(address: str) -> IPv4Address | IPv6Address | None:
    """Return an address without its zone; an IPv4-mapped one of IPv6 is one of IPv4."""
    parsed = ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return mapped or parsed


class ConnectionLimiter:
    """Who is connected: everybody, and the strangers (who have not shown a key) of each network.

    Where strangers are too many the one that came first gives way: whoever has a key shows it at once, so who
    still has not is the one to go. A quarter of all places is for those with a key.
    """

    def __init__(self, limit: int, strangers: int, metrics: Metrics) -> None:
        """Take how many there may be, and how many strangers of one network."""
        self._limit = limit
        self._strangers_limit = strangers
        self._all = 0
        self._known: set[Connection] = set()
        self._strangers: dict[Connection, str] = {}
        """And their networks, those who came first first."""
        self._networks: Counter[str] = Counter()
        self._metrics = metrics

    def arrive(self, connection: Connection, network: str) -> Overloaded | None:
        """Count a new stranger, for whom an older one may give way, or say why it has to go.

        Args:
            connection: who came.
            network: where from; empty: that shows with its first request.
        """
        if self._all >= self._limit and not self._strangers:
            return self._refusal("connections", self._limit)
        if self._all >= self._limit or len(self._strangers) >= max(self._limit * 3 // 4, 1):
            self._make_room("connections", self._limit)
        self._all += 1
        self._metrics.connections.set(self._all)
        self._strangers[connection] = ""
        self.move(connection, network)
        return None

    def move(self, connection: Connection, network: str) -> None:
        """Count a connection without a key under this network."""
        before = self._strangers.get(connection, network)
        if before == network:
            return
        if self._networks[network] >= self._strangers_limit:
            self._make_room("connections without a key from one network", self._strangers_limit, network)
        self._forget(before)
        self._strangers[connection] = network
        self._networks[network] += 1

    def recognise(self, connection: Connection) -> None:
        """Count a connection among those that have shown the key."""
        self._forget(self._strangers.pop(connection, ""))
        self._known.add(connection)

    def look_again(self, counts: Callable[[bytes], bool]) -> None:
        """Have everybody go whose key, told by its digest, does not count any more."""
        for connection in list(self._known):
            connection.look_again(counts)

    def leave(self, connection: Connection) -> None:
        """Forget a connection that is gone."""
        self._forget(self._strangers.pop(connection, ""))
        self._known.discard(connection)
        self._all -= 1
        self._metrics.connections.set(self._all)

    def _make_room(self, what: str, limit: int, network: str | None = None) -> None:
        oldest = next(
            connection
            for connection, its_network in self._strangers.items()
            if network in (None, its_network)
        )
        self.leave(oldest)
        oldest.give_way(self._refusal(what, limit))

    def _forget(self, network: str) -> None:
        if network:
            self._networks -= Counter([network])

    def _refusal(self, what: str, limit: int) -> Overloaded:
        self._metrics.refused.labels("overloaded").inc()
        return Overloaded(f"limit {limit} {what}", limit=limit, retry_after_ms=RETRY_AFTER_MS)


class Violation(Struct, frozen=True):
    """Why a connection has to be closed."""

    code: int
    """The close code of RFC 6455."""
    reason: str


class FrameWatch:
    """Follows the frames that one client sends."""

    def __init__(self, limit: int) -> None:
        """Take the longest message in bytes, all fragments together."""
        self._limit = limit
        self._message = 0
        self._head = b""
        self._left = 0
        self._fragments = 0
        self._second = -1
        self._controls = 0

    def look(self, data: bytes, now: float) -> Violation | None:
        """Look at the next bytes that came, in order; return what is wrong, or None.

        Args:
            data: the bytes as they came from the network.
            now: seconds of any clock that does not go back.
        """
        position = 0
        while (position := position + self._left) < len(data):
            self._left = 0
            head = self._head + data[position : position + LONGEST_HEADER - len(self._head)]
            extended = {126: 2, 127: 8}.get(head[1] & 0x7F, 0) if len(head) > 1 else 0
            size = 6 + extended
            if len(head) > 1 and not head[1] & 0x80:
                return Violation(PROTOCOL_ERROR, "a client's frames must be masked")
            if len(head) < size:
                self._head = head
                return None
            position += size - len(self._head)
            self._head = b""
            self._left = int.from_bytes(head[2 : 2 + extended], "big") if extended else head[1] & 0x7F
            if extended and self._left < (126 if extended == 2 else 1 << 16):
                return Violation(PROTOCOL_ERROR, "the length of a frame is not written in its shortest form")
            wrong = self._count(head[0], now)
            if wrong is not None:
                return wrong
        self._left = position - len(data)
        return None

    def _count(self, first: int, now: float) -> Violation | None:
        if first & 0x0F >= CLOSE:
            second = int(now)
            self._controls = self._controls + 1 if second == self._second else 1
            self._second = second
            if self._controls > CONTROLS_PER_SECOND:
                return Violation(POLICY, f"limit {CONTROLS_PER_SECOND} control frames in a second")
            return None
        self._fragments += 1
        self._message += self._left
        if self._message > self._limit:
            return Violation(TOO_BIG, f"limit {self._limit} bytes in a message")
        if self._fragments > FRAGMENTS:
            return Violation(POLICY, f"limit {FRAGMENTS} fragments in a message")
        if first & 0x80:
            self._fragments = self._message = 0
        return None


class Connection(web.RequestHandler):
    """One connection. What aiohttp calls `request.protocol` is one of these."""

    def __init__(
        self,
        server: web.Server,
        limiter: ConnectionLimiter,
        *,
        longest_message: int,
        proxies: ProxyRules | None = None,
        **options: Any,
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.address = ""
        """Who asks: the other end, or for whom a trusted proxy does."""
        self.violation: asyncio.Future[Violation] | None = None
        """Done when the client has broken the rules of WebSocket; made when it becomes one."""
        self._limiter = limiter
        self._proxies = proxies or ProxyRules()
        self._peer = ""
        self._shown: bytes | None = None
        self.is_stranger = True
        """Whether it has not shown the key yet."""
        self._refused = False
        """Whether it is not taken up at all."""
        self._counted = False
        self._tcp: asyncio.Transport | None = None
        self._watch = FrameWatch(longest_message)
        self._from_stranger = 0

    def recognise(self, digest: bytes | None = None) -> None:
        """Note that the connection has shown the key; `digest`: which, where it may be revoked."""
        self._shown = digest or self._shown
        if self.is_stranger and self._counted:
            self.is_stranger = False
            self._limiter.recognise(self)

    def look_again(self, counts: Callable[[bytes], bool]) -> None:
        """End the connection if the key that it has shown does not count any more."""
        if self._shown is None or counts(self._shown) or self._tcp is None:
            return
        if self.violation is None:
            self._tcp.abort()
        elif not self.violation.done():
            self.violation.set_result(Violation(CLOSE_UNAUTHORISED, "the API key does not count any more"))

    def speaks_for(self, headers: Sequence[str]) -> None:
        """Take who asks from X-Forwarded-For, if a trusted proxy is at the other end.

        Args:
            headers: all values of it in the request that came.
        """
        if self._proxies.trusts(self._peer):
            self.address = self._proxies.client(self._peer, headers)
            if self.is_stranger and self._counted:
                self._limiter.move(self, network_of(self.address))

    def give_way(self, refusal: Overloaded) -> None:
        """End the connection for the sake of a newer one. It is told why, where that is still possible."""
        self._counted = False
        if self._tcp is None:
            return
        if self.violation is not None:
            if not self.violation.done():
                self.violation.set_result(Violation(CLOSE_LIMIT, str(refusal)))
            return
        request = self._current_request
        if request is None or request.writer.output_size == 0:
            self._tcp.write(_raw_answer(refusal))
            self._tcp.close()
        else:
            self._tcp.abort()

    def abort(self) -> None:
        """Give up what has not been sent yet, unlike `force_close`."""
        if self._tcp is not None:
            self._tcp.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)  # other event loops have classes of their own
        peer = transport.get_extra_info("peername")
        self.address = self._peer = str(peer[0]) if isinstance(peer, tuple) else "local"
        network = "" if self._proxies.trusts(self._peer) else network_of(self._peer)
        refusal = self._limiter.arrive(self, network)
        if refusal is None:
            self._counted = True
            super().connection_made(transport)
            return
        self._refused = True
        self._tcp.write(_raw_answer(refusal))
        self._tcp.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._tcp = None
        if self._counted:
            self._counted = False
            self._limiter.leave(self)
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, unless the connection is refused or breaks a rule."""
        if not self._refused and self._is_fine(data):
            super().data_received(data)

    def set_parser(self, parser: Any, data_received_cb: Callable[[], None] | None = None) -> None:
        """Become a WebSocket: from here on every byte is looked at before aiohttp's parser gets it."""
        self.violation = asyncio.get_running_loop().create_future()
        if not self._is_fine(self._message_tail):
            self._message_tail = b""
        super().set_parser(parser, data_received_cb)

    def _is_fine(self, data: bytes) -> bool:
        """Return whether aiohttp may have these bytes; a violation ends the connection."""
        if self.violation is None:
            return True
        if self.violation.done():
            return False
        found = self._watch.look(data, asyncio.get_running_loop().time())
        if found is None and self.is_stranger:
            self._from_stranger += len(data)
            if self._from_stranger > STRANGER_BYTES:
                found = Violation(POLICY, f"limit {STRANGER_BYTES} bytes before initialize")
        if found is not None:
            self.violation.set_result(found)
        return found is None

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


def _raw_answer(error: Overloaded) -> bytes:
    body = msgspec.json.encode({"error": to_wire(error)})
    head = (
        "HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {RETRY_AFTER_MS // 1000}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
