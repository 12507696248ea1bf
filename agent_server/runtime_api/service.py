"""The Runtime API: starts agent servers for tenants, and leads to them through this server's own port.

Here is what it is made of, who may use it, and what it answers at which address; `runtimes` keeps what there is, each
`runtime` runs in a machine of a backend, `proxy` passes on requests to runtimes.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from msgspec import Struct

from agent_sdk.protocol.errors import EngineUnavailable, InvalidParams, Unauthorized
from agent_sdk.workspace.disk import in_thread
from agent_server.config.options import Quota, RuntimeConfig, ServerConfig
from agent_server.config.sources import TRY_LATER, StartRefused
from agent_server.http.connection import Connection
from agent_server.http.errors import as_json
from agent_server.http.request import read_body
from agent_server.http.security import RUNTIME_KEY, WrongKeys
from agent_server.keys import ApiKey, read_key
from agent_server.logs import Logs
from agent_server.runtime_api.proxy import ID, RuntimeProxy
from agent_server.runtime_api.record import PREFIX, Tenant, Wanted
from agent_server.runtime_api.runtime import Runtime
from agent_server.runtime_api.runtimes import Runtimes
from agent_server.work import Work
from workspaces.backend.contract import Backend
from workspaces.backend.disks import Disks
from workspaces.backend.labels import INSTANCE
from workspaces.backend.process import ProcessBackend
from workspaces.backend.records import instance_of
from workspaces.box.process import BoxProcess

INSTANCE_FILE = "instance"
DEFAULT = "default"
"""The only tenant where none is configured."""
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


@asynccontextmanager
async def runtime_api(
    config: ServerConfig, folder: Path, logs: Logs, work: Work, own_key: ApiKey, wrong_keys: WrongKeys
) -> AsyncIterator[tuple[list[web.RouteDef], Callable[[str], Handler | None]]]:
    """Run it for the length of the block; yields its routes, and what serves the name of a runtime.

    When it is off there are no routes and no names.

    Raises:
        StartRefused: its configuration is wrong, or there is no engine.
    """
    if config.runtime_api == "off":
        yield [], lambda host: None
        return
    tenants = Tenants(config.runtimes, own_key, wrong_keys)
    logs.redactor.add(tenants.secrets)
    end = config.boxes_on_stop == "end"
    async with (
        _backend(config, folder, logs) as (backend, labels),
        Runtimes(config.runtimes, folder, backend, logs, labels=labels, end=end) as runtimes,
        RuntimeProxy(runtimes.find, config.runtimes.url) as proxy,
    ):
        yield RuntimeRoutes(runtimes, tenants, proxy, work, config).table(), proxy.at


@asynccontextmanager
async def _backend(
    config: ServerConfig, folder: Path, logs: Logs
) -> AsyncIterator[tuple[Backend, dict[str, str]]]:
    """Reach the backend for the length of the block; yields it with the labels of what is made there."""
    await in_thread(lambda: folder.mkdir(mode=0o700, parents=True, exist_ok=True))
    if config.runtime_api == "process":
        async with ProcessBackend(
            folder, environment=config.box_environment, prefix=PREFIX, end_rest=_end_boxes
        ) as processes:
            yield processes, {}
        return
    from workspaces.backend.docker.backend import docker_backend  # noqa: PLC0415  aiodocker costs 0.3 s

    instance = await in_thread(instance_of, folder / INSTANCE_FILE)
    disks = Disks(folder.with_name("runtime-disks"))
    async with AsyncExitStack() as stack:
        try:
            backend = await stack.enter_async_context(docker_backend(disks=disks, prefix=PREFIX))
        except EngineUnavailable as exc:
            raise StartRefused(f"runtime_api is docker: {exc}", exit_code=TRY_LATER) from None
        if disks.mechanism == "none":
            logs.log.warning("runtime_disks_unlimited", reason=disks.why)
        yield backend, {INSTANCE: instance}


async def _end_boxes(data: Path) -> None:
    """End what a server leaves that was killed."""
    for folder in await in_thread(_folders, data / "boxes"):
        box = await BoxProcess.find(folder, data / "output" / folder.name)
        if box is not None:
            await box.end()


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


class Tenants:
    """All of them, by their keys."""

    def __init__(
        self, config: RuntimeConfig, own_key: str | ApiKey, wrong_keys: WrongKeys | None = None
    ) -> None:
        """Read the keys.

        Args:
            config: the table `runtime_api`.
            own_key: the server's key, which is the one of the only tenant where none is configured.
            wrong_keys: what counts wrong keys for the whole server; None: a counter of its own.

        Raises:
            StartRefused: a key file cannot be read, or two tenants have the same key.
        """
        self.secrets: list[str] = []
        """The texts of their keys, to be kept out of logs."""
        self._keys: list[tuple[ApiKey, Tenant]] = []
        self._wrong_keys = wrong_keys or WrongKeys()
        for name, tenant in config.tenants.items():
            text = tenant.key or read_key(Path(tenant.key_file or ""))
            if text in self.secrets:
                raise StartRefused(f"runtime_api.tenants.{name}: another tenant has the same key")
            self._add(text, name, tenant, config)
        if not config.tenants:
            self._add(own_key, DEFAULT, config)

    def _add(self, key: str | ApiKey, name: str, *quotas: Quota) -> None:
        """Add a tenant who may have what the first of the quotas says that says something."""
        if isinstance(key, str):
            self.secrets.append(key)
            key = ApiKey(key)
        said = {
            field: next((value for quota in quotas if (value := getattr(quota, field)) is not None), None)
            for field in Quota.__struct_fields__
        }
        self._keys.append((key, Tenant(name=name, **said)))

    def check(self, given: Sequence[str], address: str) -> Tenant:
        """Return whose key it is.

        Args:
            given: all values of X-API-Key.
            address: who sent it.

        Raises:
            Unauthorized: there is none, or a wrong one.
            Overloaded: a wrong one, and the address had too many of them; details: retry_after_ms.
        """
        if len(given) != 1:
            raise Unauthorized(f"one key is needed: {RUNTIME_KEY}: KEY")
        # All of them are compared, so that the time tells nothing.
        found = [tenant for key, tenant in self._keys if key.is_same(given[0])]
        if found:
            return found[0]
        raise self._wrong_keys.refusal(address)


class RuntimeRoutes:
    """The addresses of the Runtime API. Every request but those through the proxy shows the key of a tenant."""

    def __init__(
        self,
        runtimes: Runtimes,
        tenants: Tenants,
        proxy: RuntimeProxy,
        work: Work,
        config: ServerConfig,
    ) -> None:
        """Take all runtimes, who may use them, the way to each of them, and whether new work is welcome."""
        self._runtimes = runtimes
        self._tenants = tenants
        self._proxy = proxy
        self._work = work
        self._url = config.runtimes.url.rstrip("/")
        self._body_seconds = config.body_seconds

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
        tenant = self._tenants.check(request.headers.getall(RUNTIME_KEY, []), request.protocol.address)
        request.protocol.recognise()
        return tenant

    async def _named(self, request: web.Request) -> Runtime:
        tenant = self._tenant(request)
        return self._runtimes.named(tenant, (await self._body(request, Named)).runtime_id)

    async def _body(self, request: web.Request, kind: type[T]) -> T:
        body = await read_body(request, limit=LONGEST_BODY, seconds=self._body_seconds)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
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
