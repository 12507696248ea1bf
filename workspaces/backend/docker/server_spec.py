"""A container with a server in it, described: what may be asked for, and what the engine is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.workspace.arguments import check_environment
from agent_sdk.workspace.environment import packed
from workspaces.backend.docker.labels import PORT, ROLE, SERVER
from workspaces.backend.sizes import parse_size

SERVER_PORT = 8000
KEY_NAME = "AGENT_SERVER_API_KEY"
LEAST_MEMORY = "64m"
PIDS = 4096
"""Processes and threads at a time, where nobody says otherwise."""
NEEDED_CAPABILITIES = ("CHOWN", "KILL", "SETGID", "SETPCAP", "SETUID")
"""What the image's start needs to run commands as another user than the server. Commands have none."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}")


class Volume(Struct, frozen=True):
    """A folder of the engine's machine, or a named volume, and where it is in the container."""

    source: str
    target: str
    read_only: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of the machine."""
        return self.source.startswith("/")

    @classmethod
    def parse(cls, text: str) -> Volume:
        """Read `/host:/in[:ro]` or `name:/in[:ro]`.

        Raises:
            InvalidParams: it is neither.
        """
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if not target.startswith("/") or target.rstrip("/") == "" or mode not in ("", "ro", "rw"):
            raise InvalidParams(f"volumes: {text!r} must look like /host/folder:/folder or name:/folder[:ro]")
        if not source.startswith("/") and not _NAME.fullmatch(source):
            raise InvalidParams(
                f"volumes: {source!r} is neither an absolute path nor the name of a volume; "
                "a folder is written with its whole path"
            )
        return cls(source, target, mode == "ro")

    def mount(self) -> dict[str, Any]:
        """Return it as the engine takes it. A folder that is missing is an error there, and not made."""
        kind = "bind" if self.is_folder else "volume"
        return {"Type": kind, "Source": self.source, "Target": self.target, "ReadOnly": self.read_only}


class ServerSpec(Struct, frozen=True, kw_only=True):
    """What a server in a container is to be. See `DockerWorkspace` for what each means."""

    image: str
    name: str
    env: Mapping[str, str] = {}
    """Of the server: its options."""
    command_env: Mapping[str, str] = {}
    """Of the commands that run in its workspaces."""
    volumes: tuple[Volume, ...] = ()
    network: str | None = None
    host_port: int | None = None
    """None: one that the engine chooses."""
    ports: tuple[int, ...] = ()
    platform: str | None = None
    gpus: str | None = None
    memory: str | None = None
    cpus: float | None = None
    pids: int | None = None
    runtime: str | None = None
    """Of the engine, e.g. `runsc`; None: its default."""
    labels: Mapping[str, str] = {}
    pull: Literal["missing", "always", "never"] = "missing"
    box_user: int | None = None
    """The user whose commands run; None: the image's."""
    port: int = SERVER_PORT
    """Where the server in it listens."""
    command: tuple[str, ...] | None = None
    """Run instead of what the image says."""
    working_dir: str | None = None
    """Of that command."""
    user: int | None = None
    """Of that command; None: the image's."""
    group: int | None = None
    """A further group of its process, which may write the volumes."""
    key_names: tuple[str, ...] = (KEY_NAME,)
    """The variables in which the server finds its key."""

    def check(self) -> None:
        """Check that it makes sense, without asking anybody.

        Raises:
            InvalidParams, PolicyDenied: it does not; the sentence names the field.
        """
        if not _NAME.fullmatch(self.name):
            raise InvalidParams(
                f"name: {self.name!r} is no name of a container; use letters, digits, dots, - and _"
            )
        if not self.image or self.image != self.image.strip():
            raise InvalidParams("server_image: it is empty, or has spaces around it")
        for port in (*self.ports, *([self.host_port] if self.host_port is not None else [])):
            if not 1 <= port <= 65535:
                raise InvalidParams(f"ports: {port} is no port; they go from 1 to 65535")
        if self.memory is not None:
            parse_size("memory", self.memory, least=LEAST_MEMORY)
        if self.cpus is not None and not 0.01 <= self.cpus <= 1024:
            raise InvalidParams(f"cpus: {self.cpus} must be between 0.01 and 1024")
        if self.pids is not None and not 32 <= self.pids <= 1 << 22:
            raise InvalidParams(f"pids: {self.pids} must be between 32 and {1 << 22}")
        if self.gpus is not None and not self.gpus.strip():
            raise InvalidParams("gpus: write all, a number, or ids separated by commas")
        check_environment(self.command_env)

    def body(self, api_key: str, bind: str | None) -> dict[str, Any]:
        """Return what the engine is asked to create.

        Args:
            api_key: what clients will need.
            bind: the address on which ports are published; None: none is.
        """
        options = {**self.env, **dict.fromkeys(self.key_names, api_key)}
        if self.command_env:
            options.update(packed(self.command_env))
        if self.box_user is not None:
            options["AGENT_SERVER_BOX_USER"] = str(self.box_user)
        body: dict[str, Any] = {
            "Image": self.image,
            "Env": [f"{name}={value}" for name, value in options.items()],
            "Labels": {**self.labels, ROLE: SERVER, PORT: str(self.port)},
            "ExposedPorts": {f"{port}/tcp": {} for port in (self.port, *self.ports)},
            "HostConfig": self._host_config(bind),
        }
        if self.command is not None:
            body |= {"Entrypoint": list(self.command), "Cmd": []}
        if self.working_dir is not None:
            body["WorkingDir"] = self.working_dir
        if self.user is not None:
            body["User"] = str(self.user)
        return body

    def _host_config(self, bind: str | None) -> dict[str, Any]:
        memory = 0 if self.memory is None else parse_size("memory", self.memory)
        return {
            "CapDrop": ["ALL"],
            "CapAdd": list(NEEDED_CAPABILITIES),
            "SecurityOpt": ["no-new-privileges:true"],
            "PidsLimit": self.pids or PIDS,
            "Memory": memory,
            "MemorySwap": memory,
            "NanoCpus": int((self.cpus or 0) * 1e9),
            "NetworkMode": self.network or "default",
            "PortBindings": {} if bind is None else self._published(bind),
            "Mounts": [volume.mount() for volume in self.volumes],
            "DeviceRequests": [] if self.gpus is None else [_gpus(self.gpus)],
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
            "RestartPolicy": {"Name": "no"},
            "GroupAdd": [] if self.group is None else [str(self.group)],
            **({"Runtime": self.runtime} if self.runtime else {}),
        }

    def _published(self, bind: str) -> dict[str, Any]:
        own = "" if self.host_port is None else str(self.host_port)
        further = {f"{port}/tcp": [{"HostIp": bind, "HostPort": ""}] for port in self.ports}
        return {**further, f"{self.port}/tcp": [{"HostIp": bind, "HostPort": own}]}


def _gpus(wanted: str) -> dict[str, Any]:
    """What `docker run --gpus` asks for."""
    request: dict[str, Any] = {"Driver": "", "Capabilities": [["gpu"]]}
    if wanted == "all" or wanted.isdecimal():
        return {**request, "Count": -1 if wanted == "all" else int(wanted)}
    return {**request, "DeviceIDs": [part.strip() for part in wanted.split(",")]}
