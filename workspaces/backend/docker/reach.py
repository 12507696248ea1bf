"""How what listens in a container is reached from here: over which address, and in which network.

An engine of this machine publishes ports on 127.0.0.1. One that DOCKER_HOST names on another machine
publishes them on the very address by which it is reached, and no other. When this process runs in a
container of that engine itself, 127.0.0.1 is somebody else: then both containers are in one network, and
nothing is published. Which container that is, its mounts tell. The engine mounts folders of its own machine; such a
process sees them elsewhere, and only those that are mounted into it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from msgspec import Struct

from agent_sdk.protocol.errors import EngineUnavailable, InvalidParams, NotFound, WorkspaceUnavailable

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine

LOOPBACK = "127.0.0.1"
SELF = Path("/proc/self")
_MOUNTED = re.compile(r"containers/([0-9a-f]{64})/\S+ /etc/(?:hostname|hosts|resolv\.conf) ")
"""Engines mount these three into every container, from a folder named after it."""


class Reach(Struct, frozen=True, kw_only=True):
    """One way."""

    bind: str | None = None
    """The address of the engine's machine on which ports are published; None: none is."""
    network: str | None = None
    """The network that the container has to be in; None: the engine's default."""

    @property
    def is_here(self) -> bool:
        """Whether the engine's machine is this one, with the same folders."""
        return self.bind == LOOPBACK

    def url(self, inspected: dict[str, Any], port: int) -> str:
        """Return where a port of a running container is reached.

        Args:
            inspected: what the engine says of the container.
            port: in the container.

        Raises:
            WorkspaceUnavailable: it is not, because the container does not run or is in another network.
        """
        settings = inspected["NetworkSettings"]
        if self.bind is None:
            address = (settings["Networks"].get(self.network) or {}).get("IPAddress")
            place = address and _place(address, port)
        else:
            published = (settings.get("Ports") or {}).get(f"{port}/tcp")
            place = published and _place(self.bind, published[0]["HostPort"])
        if not place:
            raise WorkspaceUnavailable(
                f"port {port} of the container {inspected['Name'].strip('/')} cannot be reached: "
                "it does not run, or is in another network",
                phase="ready",
            )
        return f"http://{place}"


class HostPaths:
    """From paths of this process to those of the engine."""

    def __init__(self, mounts: Mapping[Path, Path] | None = None, unseen: str = "") -> None:
        """Take the folders of the engine by where they are mounted here; None: both see the same."""
        self._mounts = mounts
        self.unseen = unseen
        """Why the engine does not see what is mounted here; empty: it does."""

    @classmethod
    async def find(cls, engine: Engine, *, process: Path = SELF) -> Self:
        """Find out whether this process runs in a container that this engine knows, or on another machine than it.

        Raises:
            EngineUnavailable: the engine does not answer.
        """
        container = await own_container(engine, process)
        if container is None:
            here = await engine_address(engine) == LOOPBACK
            return cls(None, "" if here else f"the engine at {engine.where} is on another machine")
        mounts = container.get("Mounts") or ()
        return cls(
            {Path(mount["Destination"]): Path(mount["Source"]) for mount in mounts if mount.get("Source")},
            "the server runs in a container, and its engine does not see what is mounted there",
        )

    def __repr__(self) -> str:
        return f"<HostPaths {'the same' if self._mounts is None else dict(self._mounts)}>"

    def of(self, path: Path) -> str:
        """Return what the engine calls a folder.

        Raises:
            WorkspaceUnavailable: the engine cannot reach it, because it is not mounted into this container.
        """
        if self._mounts is None:
            return str(path)
        for place in (path, *path.parents):
            if place in self._mounts:
                return str(self._mounts[place] / path.relative_to(place))
        raise WorkspaceUnavailable(
            f"the server runs in a container, and {path} is not on a volume that sandboxes could mount, too; "
            "mount a volume or a folder there (docker run --volume agent-data:/data)",
            phase="create",
        )


async def find_reach(engine: Engine, network: str | None) -> Reach:
    """Find the way to containers of this engine that are to be in this network; None: any.

    Raises:
        InvalidParams: nothing in that network can be reached.
        EngineUnavailable: the engine does not answer, or its machine's name has no address.
    """
    if network in ("host", "none") or (network or "").startswith("container:"):
        raise InvalidParams(
            f"network: {network} cannot be used: the server must be reached, and from this machine only; "
            "leave it out, or name a network that you made"
        )
    own = await own_container(engine)
    if own is not None and own["HostConfig"]["NetworkMode"] != "host":
        return Reach(network=_shared(own, network))
    return Reach(bind=await engine_address(engine), network=network)


async def engine_address(engine: Engine) -> str:
    """Return the address of the engine's machine; LOOPBACK: it is this one.

    Raises:
        EngineUnavailable: its name has none.
    """
    parts = urlsplit(engine.where)
    if parts.scheme not in ("tcp", "http", "https") or not parts.hostname:
        return LOOPBACK
    return await _address(parts.hostname)


async def own_container(engine: Engine, process: Path = SELF) -> dict[str, Any] | None:
    """Return what the engine says of the container that this process runs in; None: it runs in none of this engine.

    Args:
        engine: the one that is asked.
        process: the folder of another process in /proc instead.

    Raises:
        EngineUnavailable: it does not answer.
    """
    found = own_container_id(process)
    try:
        return None if found is None else await engine.inspect(found)
    except NotFound:
        return None


def own_container_id(process: Path = SELF) -> str | None:
    """Return the id of the container that this process runs in, as its mounts tell it. Reads one small file."""
    try:
        found = _MOUNTED.search((process / "mountinfo").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _shared(own: dict[str, Any], network: str | None) -> str:
    mine = [name for name, end in own["NetworkSettings"]["Networks"].items() if end.get("IPAddress")]
    if network in mine or (network is None and mine):
        return network or mine[0]
    name = own["Name"].strip("/")
    mend = f"connect it: docker network connect {network or 'NETWORK'} {name}"
    raise InvalidParams(
        f"network: this program runs in the container {name}, which is not in "
        f"{f'the network {network}' if network else 'any network'}; {mend}"
    )


async def _address(host: str) -> str:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise EngineUnavailable(
            f"the engine's machine {host} has no address: {exc.strerror or exc}; look at DOCKER_HOST",
            phase="engine",
        ) from None
    address = ipaddress.ip_address(found[0][4][0])
    return LOOPBACK if address.is_loopback else str(address)


def _place(address: str, port: int | str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
