"""What the Runtime API answers at which address."""

from __future__ import annotations

import asyncio
import math
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web
from msgspec import Struct

from agent_sdk.protocol.errors import InvalidParams, InvalidRequest, LimitExceeded
from agent_server.http.connection import Connection
from agent_server.http.errors import as_json
from agent_server.runtime_api.proxy import ID, RuntimeProxy
from agent_server.runtime_api.record import Wanted
from agent_server.runtime_api.runtime import Runtime
from agent_server.runtime_api.runtimes import Runtimes
from agent_server.runtime_api.tenants import HEADER, Tenant, Tenants
from agent_server.work import Work

LONGEST_BODY = 1 << 20
LONGEST_WAIT = 60.0
_WAIT = {
    "wait": f"seconds until the answer comes at the latest, 0..{LONGEST_WAIT:g} (0); before that it comes when the "
    "runtime is ready or has failed"
}
PARAMETERS = dict.fromkeys(("/start", "/resume", "/sessions/{session_id}"), _WAIT)
"""By address, each with what it is for."""

T = TypeVar("T")


class Named(Struct, frozen=True):
    """The body of calls about one runtime."""

    runtime_id: str


BODIES = {"/start": Wanted, "/stop": Named, "/pause": Named, "/resume": Named}
"""By address."""


class RuntimeRoutes:
    """The addresses of the Runtime API. Every request but those through the proxy shows the key of a tenant."""

    def __init__(
        self,
        runtimes: Runtimes,
        tenants: Tenants,
        proxy: RuntimeProxy,
        work: Work,
        *,
        url: str,
        body_seconds: float,
    ) -> None:
        """Take the parts.

        Args:
            runtimes: all of them.
            tenants: who may use them.
            proxy: the way to each of them.
            work: whether new work is welcome.
            url: what clients reach this server by; empty: the Host they ask for.
            body_seconds: how long the body of a request may take.
        """
        self._runtimes = runtimes
        self._tenants = tenants
        self._proxy = proxy
        self._work = work
        self._url = url.rstrip("/")
        self._body_seconds = body_seconds

    def table(self) -> list[web.RouteDef]:
        """Return all routes, without what is at the name of a runtime."""
        return [
            web.post("/start", self.start),
            web.post("/stop", self.stop),
            web.post("/pause", self.pause),
            web.post("/resume", self.resume),
            web.get("/sessions/{session_id}", self.session),
            web.get("/list", self.list),
            web.route(hdrs.METH_ANY, r"/runtimes/{runtime_id}/{rest:.*}", self._proxy.serve),
        ]

    async def start(self, request: web.Request) -> web.Response:
        """Start the runtime of a session, or return the one there is; a paused or failed one is started again.

        Returns:
            The runtime.

        Raises:
            InvalidParams: the body does not fit, or there is no such factor.
            PolicyDenied: the image or the class is not allowed, or it is more than the tenant may ever have.
            Overloaded: over the tenant's quota until something is paused or stopped; or the server is stopping (503).
        """
        tenant = self._tenant(request)
        wanted = await self._body(request, Wanted)
        self._work.admit()
        runtime = await self._runtimes.start(tenant, wanted)
        return await self._answer(request, runtime)

    async def stop(self, request: web.Request) -> web.Response:
        """End a runtime and remove it with its files. The answer comes when that is done.

        Returns:
            The runtime.

        Raises:
            NotFound: the tenant has no such runtime.
        """
        runtime = await self._named(request)
        await self._runtimes.stop(runtime)
        return self._shown(request, runtime)

    async def pause(self, request: web.Request) -> web.Response:
        """Let nothing in a runtime run until it is resumed; its files stay. The answer comes when that is done.

        Returns:
            The runtime.

        Raises:
            NotFound: the tenant has no such runtime.
        """
        runtime = await self._named(request)
        await runtime.pause()
        return self._shown(request, runtime)

    async def resume(self, request: web.Request) -> web.Response:
        """Let a runtime run again.

        Returns:
            The runtime.

        Raises:
            NotFound: the tenant has no such runtime.
            Overloaded: over the tenant's quota until something is paused or stopped; or the server is stopping (503).
        """
        tenant = self._tenant(request)
        runtime = await self._named(request)
        self._work.admit()
        await self._runtimes.resume(tenant, runtime)
        return await self._answer(request, runtime)

    async def session(self, request: web.Request) -> web.Response:
        """Describe the runtime of a session.

        Returns:
            The runtime.

        Raises:
            NotFound: the tenant has no such session.
        """
        runtime = self._runtimes.session(self._tenant(request), request.match_info["session_id"])
        return await self._answer(request, runtime)

    async def list(self, request: web.Request) -> web.Response:
        """List all runtimes of the tenant, the oldest first.

        Returns:
            `{"runtimes": […]}`.
        """
        tenant = self._tenant(request)
        found = [
            runtime.shown(self._address(request, runtime.record.runtime_id))
            for runtime in self._runtimes.of(tenant)
        ]
        return as_json({"runtimes": found})

    # --- what they share ---

    def _tenant(self, request: web.Request) -> Tenant:
        assert isinstance(request.protocol, Connection)
        tenant = self._tenants.check(request.headers.getall(HEADER, []), request.protocol.address)
        request.protocol.recognise()
        return tenant

    async def _named(self, request: web.Request) -> Runtime:
        tenant = self._tenant(request)
        return self._runtimes.named(tenant, (await self._body(request, Named)).runtime_id)

    async def _body(self, request: web.Request, kind: type[T]) -> T:
        if (request.content_length or 0) > LONGEST_BODY:
            raise LimitExceeded(f"a body of more than {LONGEST_BODY} bytes", field="body", limit=LONGEST_BODY)
        try:
            async with asyncio.timeout(self._body_seconds):
                return msgspec.json.decode(await request.read(), type=kind)
        except TimeoutError:
            raise InvalidRequest(
                f"the body did not arrive within {self._body_seconds:g} s", status=408
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise InvalidParams(f"the body does not fit: {exc}") from None

    async def _answer(self, request: web.Request, runtime: Runtime) -> web.Response:
        """Tell of a runtime; with `?wait=SECONDS` not before it has become what it was about to become."""
        await runtime.settled(_seconds(request.query.get("wait", "0")))
        return self._shown(request, runtime)

    def _shown(self, request: web.Request, runtime: Runtime) -> web.Response:
        return as_json(runtime.shown(self._address(request, runtime.record.runtime_id)))

    def _address(self, request: web.Request, runtime_id: str) -> str:
        if ID in self._url:
            return self._url.replace(ID, runtime_id)
        return f"{self._url or f'{request.scheme}://{request.host}'}/runtimes/{runtime_id}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_WAIT:
        raise InvalidParams(f"?wait must be 0..{LONGEST_WAIT:g} seconds")
    return seconds
