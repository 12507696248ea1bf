"""HTTP to one provider: the only place that knows aiohttp, and where its errors become ours.

Imported at the first request, because aiohttp takes longer to import than everything else here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping

import aiohttp

from agent_sdk.agent.llm.failure import broken, shown
from agent_sdk.agent.llm.provider import Address
from agent_sdk.outbound import TLS_THERE, failure, proxy_for, speaks_tls, tls_problem, trusted
from agent_sdk.protocol.errors import AgentServerError, ModelError, ModelRefused, ModelUnavailable

CONNECT_SECONDS = 30.0

ANSWER_SECONDS = 3600.0
"""For a whole answer: more than any provider works on one, and an end for one that drips for ever."""

_DRAIN_SECONDS = 0.2


class Reply:
    """The provider's answer, whose body is still coming."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.broken: Exception | None = None
        """Why the body did not come to its proper end."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Case does not matter."""
        return self._response.headers

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, as far as it comes: what it says may be whole although `broken` is set then."""
        try:
            async for piece in self._response.content.iter_any():
                yield piece
        except (aiohttp.ClientError, OSError) as exc:
            self.broken = exc

    async def head(self, limit: int) -> bytes:
        """At most `limit` bytes of the body."""
        head = bytearray()
        async for piece in self.pieces():
            head += piece
            if len(head) >= limit:
                break
        return bytes(head[:limit])

    async def drain(self) -> None:
        """Read what stands behind the end of a stream, so that the connection can be used again.

        That is usually nothing, and already there. A provider that leaves the stream open loses the connection.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                async for _ in self.pieces():
                    pass


class Transport:
    """The connections of one client; needs a running event loop, and `close`."""

    def __init__(self, address: Address, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self._trusted: ssl.SSLContext | bool | None = None
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=ANSWER_SECONDS, sock_connect=min(CONNECT_SECONDS, timeout), sock_read=timeout
            ),
        )

    @contextlib.asynccontextmanager
    async def post(self, body: bytes) -> AsyncIterator[Reply]:
        """Send a request; the context is its answer. Redirects are not followed: the key stays with one host.

        Leaving before the end of the body closes the connection; so does cancelling.

        Raises:
            ModelUnavailable: no connection, or silence for `timeout` seconds.
            ModelAnswerBroken: the connection broke within the answer, or it is no HTTP.
            ModelRefused: its certificate is not accepted, or it speaks no TLS.
        """
        begun = False
        if self._trusted is None:
            self._trusted = await trusted(self._address.url)
        try:
            async with self._session.post(
                self._address.url,
                data=body,
                headers=self._address.headers,
                allow_redirects=False,
                proxy=proxy_for(self._address.url),
                ssl=self._trusted,
            ) as response:
                begun = True
                yield Reply(response)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            if isinstance(exc, AgentServerError):  # ModelUnauthorized is an OSError, too
                raise
            if begun and isinstance(exc, ValueError):  # of who reads the answer, not of HTTP
                raise
            if isinstance(exc, aiohttp.ServerDisconnectedError) and await speaks_tls(self._address.url):
                problem = f"{self._address.host} cannot be reached: {TLS_THERE}"
                raise ModelRefused(problem, provider=self._address.provider) from exc
            raise self._failure(exc, begun=begun) from exc

    async def close(self) -> None:
        """Close all connections; requests under way fail."""
        await self._session.close()

    def _failure(self, exc: Exception, *, begun: bool) -> ModelError:
        address, host = self._address, self._address.host
        if isinstance(exc, TimeoutError):
            reason = f"{host} was silent for {self._timeout:g} s or did not come to an end"
            if isinstance(exc, aiohttp.ConnectionTimeoutError):
                reason = f"no connection to {host} within {min(CONNECT_SECONDS, self._timeout):g} s"
            return ModelUnavailable(reason, provider=address.provider)
        if isinstance(exc, aiohttp.InvalidURL):
            return ModelRefused(
                "base_url is no address: it looks like https://host/v1", provider=address.provider
            )
        if isinstance(exc, aiohttp.ClientResponseError) and not tls_problem(exc, address.url):
            return broken(f"is no proper HTTP ({type(exc).__name__})", address)
        reason = shown(failure(exc, address.url), address)
        if not begun and tls_problem(exc, address.url) is not None:
            return ModelRefused(f"{host} cannot be reached: {reason}", provider=address.provider)
        if begun:
            return broken(f"stopped in the middle ({reason})", address)
        return ModelUnavailable(f"{host} cannot be reached: {reason}", provider=address.provider)
