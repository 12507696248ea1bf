"""DockerWorkspace: a workspace on a server in a container that is started for it."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from agent_sdk.protocol.checks import Label, OsText, Port, taking
from agent_sdk.protocol.errors import PathDenied, PathNotFound
from workspaces.backend.contract import Backend, Machine, Mount
from workspaces.backend.docker.reaper import Reaper
from workspaces.started import StartedWorkspace, StartOptions

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine
    from workspaces.server import Follow

logger = logging.getLogger("workspaces")

SERVER_USER = 10_000
"""Of the image. Commands run as another one."""


@dataclass(frozen=True, eq=False, repr=False)
class DockerOptions(StartOptions):
    """What is said of a DockerWorkspace."""

    server_image: Label = "agent-server:latest"
    _: KW_ONLY
    host_port: Port | None = None
    volumes: Iterable[OsText] = ()
    network: Label | None = None
    docker_url: OsText | None = None


class DockerWorkspace(StartedWorkspace):
    """A workspace in a container of its own, on this machine's container engine or the one of DOCKER_HOST.

    Entering starts the container, waits until the server in it is ready, and connects. Leaving removes the container;
    when this process is killed, a reaper process does. Everything else is as in RemoteWorkspace.
    """

    _kind, _removal = "container", "docker rm -f"
    _engine: Engine

    @taking(DockerOptions)
    def __init__(self, options: DockerOptions) -> None:
        """Describe the workspace; `async with` starts the container.

        Args:
            server_image: an image with the server in it; `make image` makes `agent-server:latest`.
            host_port: port of 127.0.0.1 on which the server is published; None: a free one.
            volumes: `/host/folder:/folder[:ro]` or `volume:/folder[:ro]`. Commands run as the owner of the first
                writable folder that is not root's, so that what they write belongs to that user; never as root.
            env: variables of the commands. The server itself does not see them.
            forward_env: names of variables of this process that the commands get, too, where they are set.
            network: one that exists; None: the engine's default.
            platform: e.g. `linux/amd64`; None: the engine's own.
            gpus: `all`, a number, or ids separated by commas.
            memory: a size like `2g`, at least 64m, without swap; None: no limit.
            cpus: processors that the container may use, e.g. 1.5; None: no limit.
            pids: processes and threads at a time; None: 4096.
            ports: further ports of the container, published like the server's; `port_url` says where.
            name: of the container; None: a fresh one. A kept container of this name is used again as it is.
            keep: leave the container at the end. Entering a workspace of its name without `keep` removes the container
                when that workspace is left.
            pull: when the image is fetched.
            startup_timeout: seconds for everything until it can be used.
            docker_url: unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets.
            working_dir: an existing folder in the container; None: /workspace.
            conversation: id of an existing conversation in a container that was kept, whose workspace this is then.
            heartbeat, on_connection: as for RemoteWorkspace.
            on_progress: called with phase (`engine`, `pull`, `create`, `start`, `ready`), done and total.
            on_log: called with each line that the server writes. They go to the logger `workspaces`, too.

        Raises:
            InvalidParams: an argument is not acceptable, or contradicts another.
        """
        machine = options.machine(
            options.server_image,
            mounts=tuple(Mount.parse(text) for text in options.volumes),
            network=options.network,
            host_port=options.host_port,
        )
        super().__init__(options, machine, f"docker:{options.server_image}")
        self._docker_url = options.docker_url

    @property
    def container(self) -> str | None:
        """Name of the container; None before it was entered."""
        return self._machine.name if self._server is not None else None

    async def _reach(self) -> tuple[Backend, Follow | None]:
        from workspaces.backend.docker.backend import DockerBackend  # noqa: PLC0415  its client costs 0.4 s
        from workspaces.backend.docker.engine import Engine  # noqa: PLC0415

        self._engine = await self._stack.enter_async_context(Engine(self._docker_url))
        backend = DockerBackend(self._engine)
        return backend, backend.follow

    def _reaper(self, instance: str) -> Reaper:
        return Reaper(instance, self._docker_url)

    async def _completed(self, machine: Machine) -> Machine:
        """Run commands as the owner of the first folder they may write; see that all are there, where we see them."""
        from workspaces.backend.docker.reach import find_reach  # noqa: PLC0415

        folders = [mount for mount in machine.mounts if mount.is_folder]
        if not folders or not (await find_reach(self._engine, machine.network)).is_here:
            return machine
        owners = [(volume, _owner(volume)) for volume in folders]
        writable = [(volume, owner) for volume, owner in owners if not volume.read_only]
        shifted = any(
            option in ("name=rootless", "name=userns") for option in self._engine.info.security_options
        )
        for volume, owner in writable:
            if owner not in (0, SERVER_USER) and not shifted:
                return replace(machine, env={**machine.env, "AGENT_SERVER_BOX_USER": str(owner)})
            logger.warning(
                "volumes: %s belongs to user %d, as whom commands cannot run: they may be unable to write there",
                volume.source,
                owner,
            )
        return machine


def _owner(volume: Mount) -> int:
    path = pathlib.Path(volume.source)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise PathNotFound(f"volumes: no such folder: {path}; make it first", path=str(path)) from None
    except OSError as exc:
        raise PathDenied(f"volumes: {path} cannot be used: {exc.strerror}", path=str(path)) from None
    if not os.access(path, os.R_OK):
        raise PathDenied(f"volumes: {path} cannot be read by this user", path=str(path))
    return found.st_uid
