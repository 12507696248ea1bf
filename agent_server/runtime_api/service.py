"""The Runtime API: starts agent servers for tenants, and leads to them through this server's own port.

Its parts: `tenants` says who may have what, `runtimes` keeps what there is, each `runtime` runs in a machine of a
backend, `routes` answers requests, `proxy` passes on those to runtimes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from agent_sdk.protocol.errors import EngineUnavailable
from agent_sdk.workspace.disk import in_thread
from agent_server.config.options import ServerConfig
from agent_server.config.sources import TRY_LATER, StartRefused
from agent_server.http.security import WrongKeys
from agent_server.keys import ApiKey
from agent_server.logs import Logs
from agent_server.runtime_api.proxy import RuntimeProxy
from agent_server.runtime_api.record import PREFIX
from agent_server.runtime_api.routes import RuntimeRoutes
from agent_server.runtime_api.runtimes import Runtimes
from agent_server.runtime_api.tenants import Tenants
from agent_server.work import Work
from workspaces.backend.contract import Backend
from workspaces.backend.labels import INSTANCE
from workspaces.backend.process import ProcessBackend
from workspaces.backend.records import instance_of
from workspaces.box.disks import Disks
from workspaces.box.process import BoxProcess

INSTANCE_FILE = "instance"


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
    # The engine's client costs 0.4 s.
    from workspaces.backend.docker.backend import DockerBackend  # noqa: PLC0415
    from workspaces.backend.docker.engine import Engine  # noqa: PLC0415
    from workspaces.backend.docker.reach import HostPaths  # noqa: PLC0415

    instance = await in_thread(instance_of, folder / INSTANCE_FILE)
    async with AsyncExitStack() as stack:
        try:
            engine = await stack.enter_async_context(Engine())
        except EngineUnavailable as exc:
            raise StartRefused(f"runtime_api is docker: {exc}", exit_code=TRY_LATER) from None
        disks = Disks(folder.with_name("runtime-disks"))
        await disks.prepare(unseen=(await HostPaths.find(engine)).unseen)
        if disks.mechanism == "none":
            logs.log.warning("runtime_disks_unlimited", reason=disks.why)
        yield DockerBackend(engine, disks=disks, prefix=PREFIX), {INSTANCE: instance}


async def _end_boxes(data: Path) -> None:
    """End what a server leaves that was killed."""
    for folder in await in_thread(_folders, data / "boxes"):
        box = await BoxProcess.find(folder, data / "output" / folder.name)
        if box is not None:
            await box.end()


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
