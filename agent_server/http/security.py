"""What every request passes before any route: Host, Origin, key; and the one place where errors become answers.

A web page must never reach a server that trusts its own machine.

Host: against DNS rebinding, where a page's own name suddenly points here. Loopback names and what the operator lists
are fine. On a server that listens beyond the loopback so is every literal address, because a rebound page has a name,
never an address.

Origin: browsers send it, programs do not. Absent is fine, listed is fine, all else is refused, `null` included.

Key: 256 random bits, or what the operator set (at least 16 characters), so guessing it is hopeless; the limit on wrong
keys keeps the noise down. The right key is therefore accepted even from an address that is over the limit: a forgotten
client with an old key must not lock its neighbours out, who may all share one address behind a proxy.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    HostNotAllowed,
    InternalError,
    NotFound,
    OriginNotAllowed,
    Overloaded,
    Unauthorized,
    UseHeader,
)
from agent_server.config.sources import LOOPBACK_NAMES, ip_address, is_loopback
from agent_server.http.connection import Connection, network_of
from agent_server.http.errors import http_error, refusal
from agent_server.http.request import check_query, is_upgrade
from agent_server.keys import ApiKey, digest_of
from agent_server.logs import Logs
from agent_server.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What may be asked without a key: whether the server lives, nothing about what it does."""
METRICS_PATH = "/metrics"
KEY_NAMES = frozenset(
    {
        "token",
        "key",
        "api_key",
        "apikey",
        "api-key",
        "access_token",
        "auth",
        "authorization",
        "session_api_key",
    }
)
KEY_SHOWN = web.RequestKey("key_shown", bool)
"""Whether a request carried the key; an upgrade request need not, the first message may."""
ORIGIN = web.RequestKey("origin", str)
ANSWERED = web.RequestKey("answered", bool)
"""The head of an answer is on its way: there cannot be another one."""

RUNTIME_KEY = "X-API-Key"
LONGEST_HEADER = 4096
WRONG_KEYS = 5
WINDOW_SECONDS = 60.0
ADDRESSES = 10_000
_SHOWN = 100
_NAME_AND_PORT = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID, X-API-Key, X-Session-API-Key",
    "Access-Control-Max-Age": "600",
}
_ALWAYS = {
    hdrs.CACHE_CONTROL: "no-store",
    hdrs.SERVER: "agent-server",
    hdrs.VARY: "Origin",
    "X-Content-Type-Options": "nosniff",
}


class HostRules:
    """What may stand in Host."""

    def __init__(self, listen: str, allowed: Sequence[str] = ()) -> None:
        """Take the address the server listens on and further names; `*` allows every name."""
        address = ip_address(listen)
        own = set() if address is not None and address.is_unspecified else {listen.lower()}
        self._names = LOOPBACK_NAMES | own | {name.lower() for name in allowed}
        self._beyond_loopback = not is_loopback(listen)

    def check(self, hosts: Sequence[str], target: str) -> None:
        """Accept a request.

        Args:
            hosts: all values of the Host header.
            target: the request target as it came.

        Raises:
            HostNotAllowed: details: host, and `status`, the HTTP status that fits.
        """
        if len(hosts) != 1:
            count = "no" if not hosts else "more than one"
            raise HostNotAllowed(f"the request has {count} Host header", status=400)
        if not target.startswith("/") and target != "*":
            raise HostNotAllowed("the request target must start with /", status=400)
        host = hosts[0]
        found = _NAME_AND_PORT.fullmatch(host)
        if found is None or not 0 < int(found["port"] or 1) <= 65535:
            raise HostNotAllowed("the Host header is no host name", status=400)
        if "*" not in self._names and not self._allows(found["name"].lower()):
            raise HostNotAllowed(
                f"this server is not {host[:_SHOWN]}; the operator can add the name to allow_hosts",
                host=host[:_SHOWN],
                status=421,
            )

    def _allows(self, name: str) -> bool:
        if name in self._names:
            return True
        address = ip_address(name)
        if address is None:
            return False
        return address.is_loopback or (self._beyond_loopback and not address.is_unspecified)


class OriginRules:
    """What may stand in Origin."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = frozenset(origin.lower().rstrip("/") for origin in allowed)

    def check(self, origins: Sequence[str]) -> str | None:
        """Accept a request; returns the allowed origin it came from, None for a program.

        Raises:
            OriginNotAllowed: details: origin.
        """
        if not origins:
            return None
        if len(origins) == 1 and origins[0].lower() in self._allowed:
            return origins[0]
        shown = ", ".join(origins)[:_SHOWN]
        raise OriginNotAllowed(
            f"web pages of {shown} may not connect; the operator can add the origin to allow_origins",
            origin=shown,
        )


class WrongKeys:
    """Wrong keys per network in the last minute, whatever they were shown for: all doors of a server share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()

    def refusal(self, address: str) -> AgentServerError:
        """Count a wrong key, and return what to answer it.

        Unauthorized, or where the network of the address had too many of them Overloaded, with retry_after_ms.
        """
        network, now = network_of(address), self._clock()
        times = self._wrong.setdefault(network, deque(maxlen=WRONG_KEYS))
        wait = times[0] + WINDOW_SECONDS - now if len(times) == WRONG_KEYS else 0.0
        if wait > 0:
            return Overloaded(
                f"too many wrong API keys; wait {wait:.0f} s",
                limit=WRONG_KEYS,
                retry_after_ms=int(wait * 1000) + 1,
            )
        times.append(now)
        self._wrong.move_to_end(network)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)
        return Unauthorized("wrong API key")


class Authority:
    """Says yes or no to a key."""

    def __init__(
        self, key: ApiKey, wrong_keys: WrongKeys | None = None, *, for_metrics: ApiKey | None = None
    ) -> None:
        """Take what counts as the key; `for_metrics` opens `/metrics` and nothing else."""
        self._key = key
        self._for_metrics = for_metrics
        self._wrong_keys = wrong_keys or WrongKeys()

    def check(self, given: str | None, address: str, *, metrics: bool = False) -> bytes:
        """Accept a key; returns its digest.

        Args:
            given: what was shown.
            address: who shows it.
            metrics: whether it is shown for `/metrics`.

        Raises:
            Unauthorized: there is none, or a wrong one.
            Overloaded: a wrong one, and the address had too many of them; details: retry_after_ms.
        """
        if given is None:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY")
        digest = digest_of(given)
        if self._key.has(digest):
            return digest
        if metrics and self._for_metrics is not None and self._for_metrics.has(digest):
            return digest
        raise self._wrong_keys.refusal(address)


def bearer(headers: Sequence[str], *, query: bool = False) -> str | None:
    """Return the key in the Authorization headers; None when there is no such header.

    Args:
        headers: all values of Authorization.
        query: whether the address carries something that looks like a key; it would end up in logs.

    Raises:
        UseHeader: the key came some other way, or the header is not of the form `Bearer KEY`.
    """
    if query:
        raise UseHeader("a key in the address ends up in logs; use the header Authorization: Bearer KEY")
    if not headers:
        return None
    scheme, _, key = headers[0].partition(" ")
    if len(headers) > 1 or len(headers[0]) > LONGEST_HEADER:
        raise UseHeader("one header Authorization: Bearer KEY is needed")
    if scheme.lower() != "bearer":
        raise UseHeader("this scheme is not supported; use the header Authorization: Bearer KEY")
    return key


class Security:
    """What every request passes before any route."""

    def __init__(
        self,
        hosts: HostRules,
        origins: OriginRules,
        authority: Authority,
        logs: Logs,
        metrics: Metrics,
        own_keys: Collection[Handler] = (),
        at: Callable[[str], Handler | None] = lambda host: None,
    ) -> None:
        """Take the rules, the handlers that check keys of their own, and what serves other names than this server's."""
        self._at = at
        self._hosts = hosts
        self._origins = origins
        self._authority = authority
        self._logs = logs
        self._metrics = metrics
        self._own_keys = own_keys

    def middlewares(self) -> list[Middleware]:
        """Return the middlewares, outermost first."""

        @web.middleware
        async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answer(request, handler)

        @web.middleware
        async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._admit(request, handler)

        return [answer, admit]

    async def label(self, request: web.Request, response: web.StreamResponse) -> None:
        """Put on every answer what browsers and caches should know (aiohttp's on_response_prepare)."""
        request[ANSWERED] = True
        response.headers.update(_ALWAYS)
        if ORIGIN in request:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = request[ORIGIN]

    async def _answer(self, request: web.Request, route: Handler) -> web.StreamResponse:
        try:
            return await route(request)
        except AgentServerError as exc:
            answer: web.StreamResponse = self._refuse(exc)
        except web.HTTPException as exc:
            answer = http_error(exc.status, exc.reason)
            if hdrs.ALLOW in exc.headers:
                answer.headers[hdrs.ALLOW] = exc.headers[hdrs.ALLOW]
        except ConnectionError:
            raise  # nobody is there any more to be answered
        except Exception as exc:  # noqa: BLE001  the boundary of a request, as Peer's is that of a call
            incident = new_id()
            self._logs.bug(exc, incident)
            self._metrics.bugs.inc()
            answer = refusal(InternalError("internal error", incident=incident))
        if ANSWERED in request:
            # What was sent breaks off, so that nobody takes it for whole.
            raise ConnectionError(f"the answer to {request.path} broke off")
        if is_upgrade(request) or not request.content.is_eof():
            # What follows in the stream was meant for something that does not happen now.
            answer.force_close()
        return answer

    def _refuse(self, error: AgentServerError) -> web.Response:
        self._metrics.refused.labels(error.kind).inc()
        self._logs.log.debug("request_refused", kind=error.kind, problem=error.message)
        return refusal(error)

    async def _admit(self, request: web.Request, route: Handler) -> web.StreamResponse:
        assert isinstance(request.protocol, Connection)
        request.protocol.speaks_for(request.headers.getall(hdrs.X_FORWARDED_FOR, []))
        hosts = request.headers.getall(hdrs.HOST, [])
        elsewhere = self._at(hosts[0]) if len(hosts) == 1 else None
        if elsewhere is not None:
            return await elsewhere(request)  # an origin of its own, with its own rules
        self._hosts.check(hosts, request.raw_path)
        origin = self._origins.check(request.headers.getall(hdrs.ORIGIN, []))
        if origin is not None:
            request[ORIGIN] = origin
            if request.method == hdrs.METH_OPTIONS:
                return web.Response(status=204, headers=_PREFLIGHT)
        if request.match_info.handler not in self._own_keys:
            if request.path not in OPEN_PATHS:
                request[KEY_SHOWN] = self._check_key(request)
            check_query(request)
        return await route(request)

    def _not_of_the_runtime_api(self, request: web.Request) -> AgentServerError:
        """Return what to tell a client whose header shows that the Runtime API is meant."""
        if not self._own_keys:
            return NotFound("this server runs no Runtime API; its operator can set runtime_api")
        if request.match_info.http_exception is None:
            return UseHeader(
                f"{RUNTIME_KEY} is for the Runtime API; use the header Authorization: Bearer KEY"
            )
        return NotFound(
            f"the Runtime API has no {request.method} {request.path[:_SHOWN]}; it has POST /start, /stop, /pause and "
            "/resume, GET /sessions/ID and /list"
        )

    def _check_key(self, request: web.Request) -> bool:
        """Return whether the key was shown; False only for an upgrade request, whose first message may show it."""
        key = bearer(
            request.headers.getall(hdrs.AUTHORIZATION, []),
            query=any(name.lower() in KEY_NAMES for name in request.query),
        )
        if key is None and is_upgrade(request):
            return False
        if key is None and RUNTIME_KEY in request.headers:
            raise self._not_of_the_runtime_api(request)
        assert isinstance(request.protocol, Connection)
        digest = self._authority.check(key, request.protocol.address, metrics=request.path == METRICS_PATH)
        request.protocol.recognise(digest)
        return True
