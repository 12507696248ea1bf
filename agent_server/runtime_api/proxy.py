"""The way through this server to a runtime: HTTP and WebSocket, so that one port serves all of them.

A request goes on as it came, without what belongs to one connection alone; the answer likewise. The
runtime's own key protects it, which is the runtime's to check. Where a runtime has no name of its own, its
answers cannot act for all that this server's name stands for: no cookies, no workers, no scripts.

A WebSocket is two network connections joined into one: bytes go through as they are, in both directions, at the
slower one's pace. So all of it arrives that is sent: fragments, pings, close codes, extensions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self, cast
from urllib.parse import urlsplit

import aiohttp
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from agent_sdk.protocol.errors import HostNotAllowed, NotFound, WorkspaceUnavailable
from agent_server.config.sources import StartRefused
from agent_server.http.connection import Connection
from agent_server.http.request import is_upgrade
from agent_server.http.security import RUNTIME_KEY
from agent_server.keys import ApiKey
from agent_server.runtime_api.runtime import Runtime


class Tunnel:
    """Joins two transports, which it closes together."""

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when both connections are closed."""
        self._ends: list[_End] = []

    def join(self, near: Any, far: Any) -> None:
        """Take over two connections of aiohttp whose upgrade is done.

        Args:
            near: the protocol of the one, a client's; it is told when its connection is lost.
            far: the same of the other, to a server.
        """
        one, other = _End(self, near), _End(self, far)
        self._ends = [one, other]
        one.other, other.other = other, one
        # What came with the head of the upgrade is handed over by `set_parser`, at once.
        far.set_parser(_Early(one), None)
        near.set_parser(_Early(other))
        for end in self._ends:
            end.take_over()

    def close(self) -> None:
        """Close both connections; what is on its way is sent before."""
        for end in self._ends:
            end.transport.close()

    def lost(self) -> None:
        """One of the connections is gone: the other one goes, too."""
        self.close()
        if all(end.is_lost for end in self._ends) and not self.over.done():
            self.over.set_result(None)


class _End(asyncio.Protocol):
    other: _End

    def __init__(self, tunnel: Tunnel, protocol: Any) -> None:
        self._tunnel = tunnel
        self._protocol = protocol
        self.transport = cast(asyncio.Transport, protocol.transport)
        self.is_lost = False

    def take_over(self) -> None:
        if self.transport.is_closing():
            self.connection_lost(None)
            return
        self.transport.set_protocol(self)
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.is_lost = True
        self._protocol.connection_lost(exc)
        self._tunnel.lost()


class _Early:
    """What aiohttp takes for a parser of WebSocket frames."""

    def __init__(self, to: _End) -> None:
        self._to = to

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._to.transport.write(data)
        return False, b""

    def feed_eof(self) -> None:
        """Nothing came."""


CONNECT_SECONDS = 5.0
READY_SECONDS = 30.0
"""How long a request waits for a runtime that is being started."""
ACCEPTED_SECONDS = 30.0
"""After which a WebSocket that a runtime still keeps counts as one of somebody with a key."""
SESSION_HEADER = "X-Session-API-Key"
RETRY_AFTER = {hdrs.RETRY_AFTER: "1"}

# Of one connection alone (RFC 9110 section 7.6.1), and what this server adds or has looked at by itself.
_NOT_PASSED_ON = frozenset(
    name.lower()
    for name in (
        hdrs.CONNECTION,
        hdrs.KEEP_ALIVE,
        "Proxy-Connection",
        hdrs.PROXY_AUTHENTICATE,
        hdrs.PROXY_AUTHORIZATION,
        hdrs.TE,
        hdrs.TRAILER,
        hdrs.TRANSFER_ENCODING,
        hdrs.UPGRADE,
        hdrs.HOST,
        hdrs.EXPECT,
        hdrs.ORIGIN,
        RUNTIME_KEY,
    )
)
# What a browser would take for the whole of this server's name.
_FOR_THE_ORIGIN = frozenset(
    name.lower()
    for name in (
        hdrs.SET_COOKIE,
        "Set-Cookie2",
        "Service-Worker-Allowed",
        "Clear-Site-Data",
        "Strict-Transport-Security",
        "Public-Key-Pins",
        "Alt-Svc",
        "NEL",
        "Report-To",
        "Reporting-Endpoints",
        hdrs.ACCESS_CONTROL_ALLOW_ORIGIN,
        hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS,
        hdrs.ACCESS_CONTROL_ALLOW_METHODS,
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS,
        hdrs.ACCESS_CONTROL_EXPOSE_HEADERS,
        hdrs.ACCESS_CONTROL_MAX_AGE,
        "Access-Control-Allow-Private-Network",
    )
)
_SANDBOX = ("Content-Security-Policy", "sandbox")
_SWITCHING = 101
ID = "{id}"
"""Stands for the id of a runtime in the option `url`."""


class RuntimeProxy:
    """The way to the runtimes. Entering opens it, leaving closes its connections to them."""

    def __init__(self, find: Callable[[str], Runtime | None], url: str = "") -> None:
        """Take what finds a runtime by its id, and the option `url`.

        Raises:
            StartRefused: the id in the URL is not the first part of its host.
        """
        self._find = find
        self.suffix = _suffix(url)
        """What follows the id in the names of runtimes, e.g. `.agents.example`; empty: they have none."""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._session is not None
        await self._session.close()

    def at(self, host: str) -> Handler | None:
        """Return what serves the name of a runtime, whatever the path; None: it is not the name of any."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.lower()
        if not self.suffix or not name.endswith(self.suffix) or "." in name.removesuffix(self.suffix):
            return None

        async def serve(request: web.Request) -> web.StreamResponse:
            if not request.raw_path.startswith("/"):  # it would become a part of the address
                raise HostNotAllowed("the request target must start with /", status=400)
            return await self._pass_on(request, name.removesuffix(self.suffix), request.raw_path)

        return serve

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on to the server in a runtime, HTTP and WebSocket as they come; its own key protects it.

        Returns:
            What that server answers.

        Raises:
            NotFound: there is no such runtime.
            WorkspaceUnavailable: it is paused, it failed, or it does not answer; with the HTTP status.
        """
        # The address goes on as it was written: `%2F` and `..` are the runtime's to understand.
        path = f"/{request.raw_path.split('/', 3)[3]}"
        return await self._pass_on(request, request.match_info["runtime_id"], path, shared=True)

    async def _pass_on(
        self, request: web.Request, runtime_id: str, path: str, *, shared: bool = False
    ) -> web.StreamResponse:
        runtime = await self._ready(runtime_id)
        headers = _passed_on(request.headers)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not shared and urlsplit(origin).netloc.lower() != request.host.lower():
            headers[hdrs.ORIGIN] = origin  # whether other pages may use it is the runtime's to say
        async with self._answer(runtime, request, path, headers) as answer:
            assert isinstance(request.protocol, Connection)
            if answer.status < 400 and _shows_key(request.headers, runtime):
                request.protocol.recognise()
            if answer.status == _SWITCHING:
                if not is_upgrade(request):
                    raise _no_answer("it switches to a protocol that nobody asked for")
                return await _join(request, answer, shared)
            return await _pass_back(request, answer, shared)

    async def _ready(self, runtime_id: str) -> Runtime:
        runtime = self._find(runtime_id)
        if runtime is None:
            raise NotFound("no such runtime")
        await runtime.settled(READY_SECONDS)
        if runtime.pod_status != "ready":
            raise WorkspaceUnavailable(
                f"the runtime cannot be reached: it is {runtime.status}",
                phase="runtime",
                status=503,
                headers=RETRY_AFTER,
            )
        return runtime

    @asynccontextmanager
    async def _answer(
        self, runtime: Runtime, request: web.Request, path: str, headers: CIMultiDict[str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        if is_upgrade(request):
            headers.update({hdrs.CONNECTION: "Upgrade", hdrs.UPGRADE: "websocket"})
        try:
            answer = await self._session.request(
                request.method,
                URL(f"{runtime.url}{path}", encoded=True),
                headers=headers,
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as exc:
            raise _no_answer(str(exc) or type(exc).__name__) from None
        async with answer:
            yield answer


def _shows_key(headers: CIMultiDictProxy[str], runtime: Runtime) -> bool:
    """Whether a request carries the key of the runtime, whose own answer says nothing: some paths need none."""
    shown = [value.removeprefix("Bearer ") for value in headers.getall(hdrs.AUTHORIZATION, [])]
    shown += headers.getall(SESSION_HEADER, [])
    key = ApiKey(runtime.record.api_key)
    return any(key.is_same(value) for value in shown)


def _no_answer(reason: str) -> WorkspaceUnavailable:
    return WorkspaceUnavailable(
        f"the runtime does not answer: {reason}", phase="runtime", status=502, headers=RETRY_AFTER
    )


def _passed_on(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    named = {
        name.strip().lower() for value in headers.getall(hdrs.CONNECTION, []) for name in value.split(",")
    }
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in _NOT_PASSED_ON and name.lower() not in named
    )


def _passed_back(answer: aiohttp.ClientResponse, shared: bool) -> CIMultiDict[str]:
    headers = _passed_on(answer.headers)
    if shared:
        for name in {name for name in headers if name.lower() in _FOR_THE_ORIGIN}:
            del headers[name]
        headers.add(*_SANDBOX)
    return headers


def _suffix(url: str) -> str:
    host = url.partition("://")[2].partition("/")[0]
    if ID not in url:
        return ""
    name, _, port = host.partition(":")
    rest = name.removeprefix(ID)
    if rest == name or not rest.startswith(".") or ID in rest or ID in port or ID in url.partition(host)[2]:
        raise StartRefused(
            f"runtime_api.url: {ID} must be the first part of the host, like https://{ID}.agents.example (got {url})"
        )
    return rest.lower()


async def _pass_back(
    request: web.Request, answer: aiohttp.ClientResponse, shared: bool
) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, reason=answer.reason, headers=_passed_back(answer, shared)
    )
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except aiohttp.ClientError:
        raise ConnectionResetError("the runtime broke off its answer") from None
    await response.write_eof()
    return response


async def _join(request: web.Request, answer: aiohttp.ClientResponse, shared: bool) -> web.StreamResponse:
    headers = _passed_back(answer, shared)
    headers.update({hdrs.CONNECTION: "Upgrade", hdrs.UPGRADE: "websocket"})
    response = web.StreamResponse(status=_SWITCHING, reason=answer.reason, headers=headers)
    await response.prepare(request)
    tunnel = Tunnel()
    assert answer.connection is not None and isinstance(request.protocol, Connection)
    # A server ends WebSockets that do not show the key in time; what goes on after that has shown it.
    accepted = asyncio.get_running_loop().call_later(ACCEPTED_SECONDS, request.protocol.recognise)
    tunnel.join(request.protocol, answer.connection.protocol)
    try:
        await tunnel.over
    finally:
        accepted.cancel()
        tunnel.close()
    return response
