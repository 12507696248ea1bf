"""What every request passes before any route: Host, Origin, key; and the one place where errors become answers."""

from __future__ import annotations

from collections.abc import Callable, Collection

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, InternalError, NotFound, UseHeader
from agent_server.config.hosts import HostRules, OriginRules
from agent_server.http.auth import Authority, bearer
from agent_server.http.connection import Connection
from agent_server.http.errors import http_error, refusal
from agent_server.http.query import check_query
from agent_server.http.websocket import is_upgrade
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
_SHOWN = 100
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
        """What to tell whose header shows that the Runtime API is meant."""
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
        """Whether the key was shown; False only for an upgrade request, whose first message may show it."""
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
