"""The Runtime API: starts agent servers for tenants, and leads to them through this server's own port.

See docs/runtime_api.md. Its parts: `tenants` says who may have what, `runtimes` keeps what there is, each
`runtime` runs in a `pod`, `runtime_routes` answers requests, `runtime_proxy` passes on those to runtimes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from agent_server.config.options import ServerConfig
from agent_server.http.auth import ApiKey
from agent_server.logs import Logs
from agent_server.runtime_api.pods import Pods
from agent_server.runtime_api.pods_process import ProcessPods
from agent_server.runtime_api.proxy import RuntimeProxy
from agent_server.runtime_api.routes import RuntimeRoutes
from agent_server.runtime_api.runtimes import Runtimes
from agent_server.runtime_api.tenants import Tenants
from agent_server.work import Work


@asynccontextmanager
async def runtime_api(
    config: ServerConfig, folder: Path, logs: Logs, work: Work, own_key: ApiKey
) -> AsyncIterator[tuple[list[web.RouteDef], Callable[[str], Handler | None]]]:
    """Run it for the length of the block; yields its routes, and what serves the name of a runtime.

    When it is off there are no routes and no names.

    Raises:
        StartRefused: its configuration is wrong, or there is no engine.
    """
    if config.runtime_api == "off":
        yield [], lambda host: None
        return
    tenants = Tenants(config.runtimes, own_key)
    logs.redactor.add(tenants.secrets)
    end = config.boxes_on_stop == "end"
    async with (
        _pods(config, folder, logs) as pods,
        Runtimes(config.runtimes, folder, pods, logs, end=end) as runtimes,
        RuntimeProxy(runtimes.find, config.runtimes.url) as proxy,
    ):
        routes = RuntimeRoutes(
            runtimes,
            tenants,
            proxy,
            work,
            url=config.runtimes.url,
            body_seconds=config.body_seconds,
        )
        yield routes.table(), proxy.at


@asynccontextmanager
async def _pods(config: ServerConfig, folder: Path, logs: Logs) -> AsyncIterator[Pods]:
    if config.runtime_api == "process":
        yield ProcessPods(config.box_environment)
        return
    from agent_server.runtime_api.pods_docker import DockerPods  # noqa: PLC0415  the engine's client costs 0.4 s

    async with DockerPods.opened(folder, logs, config.runtimes.network or None) as pods:
        yield pods
