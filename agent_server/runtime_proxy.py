"""The way through this server to a runtime: HTTP and WebSocket, so that one port serves all of them.

A request goes on as it came, without what belongs to one connection alone; the answer likewise. The
runtime's own key protects it, which is the runtime's to check.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Self

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from agent_sdk.protocol.errors import NotFound, WorkspaceUnavailable
from agent_server.connection import Connection
from agent_server.runtime import Runtime
from agent_server.tenants import HEADER
from agent_server.tunnel import Tunnel
from agent_server.upgrade import is_upgrade

CONNECT_SECONDS = 5.0
READY_SECONDS = 30.0
"""How long a request waits for a runtime that is being started."""
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
        HEADER,
    )
)
_SWITCHING = 101


class RuntimeProxy:
    """See the module's docstring. Entering opens it, leaving closes its connections to runtimes."""

    def __init__(self, find: Callable[[str], Runtime | None]) -> None:
        """Take what finds a runtime by its id."""
        self._find = find
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

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on.

        Raises:
            NotFound: there is no such runtime.
            WorkspaceUnavailable: it is paused, it failed, or it does not answer; with the HTTP status.
        """
        runtime = await self._ready(request.match_info["runtime_id"])
        async with self._answer(runtime, request) as answer:
            if answer.status < 400:
                assert isinstance(request.protocol, Connection)
                request.protocol.recognise()
            if answer.status == _SWITCHING:
                if not is_upgrade(request):
                    raise _no_answer("it switches to a protocol that nobody asked for")
                return await _join(request, answer)
            return await _pass_back(request, answer)

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
    async def _answer(self, runtime: Runtime, request: web.Request) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        headers = _passed_on(request.headers)
        if is_upgrade(request):
            headers.update({hdrs.CONNECTION: "Upgrade", hdrs.UPGRADE: "websocket"})
        # The address goes on as it was written: `%2F` and `..` are the runtime's to understand.
        rest = request.raw_path.split("/", 3)[3]
        try:
            answer = await self._session.request(
                request.method,
                URL(f"{runtime.url}/{rest}", encoded=True),
                headers=headers,
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as exc:
            raise _no_answer(str(exc) or type(exc).__name__) from None
        async with answer:
            yield answer


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


async def _pass_back(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers)
    )
    await response.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await response.write(piece)
    except aiohttp.ClientError:
        raise ConnectionResetError("the runtime broke off its answer") from None
    await response.write_eof()
    return response


async def _join(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = _passed_on(answer.headers)
    headers.update({hdrs.CONNECTION: "Upgrade", hdrs.UPGRADE: "websocket"})
    response = web.StreamResponse(status=_SWITCHING, reason=answer.reason, headers=headers)
    await response.prepare(request)
    tunnel = Tunnel()
    assert answer.connection is not None
    tunnel.join(request.protocol, answer.connection.protocol)
    try:
        await tunnel.over
    finally:
        tunnel.close()
    return response
