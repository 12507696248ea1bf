"""What containers are to the engine: those with a box (a sandbox), and those with a server; each with its hardening.

Of a sandbox the whole request is built from nothing but our own knobs. Nothing that a client wrote gets into a field it
was not meant for: there is no way to name a capability, a device, a host's namespace or a path that is not allowed.
After the start the request is compared with what the engine made of it (`verification`), because engines drop what they
do not support with a warning that nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from msgspec import Struct

from agent_sdk.protocol.errors import ImageUnavailable, InvalidParams
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.arguments import check_environment
from agent_sdk.workspace.environment import packed
from workspaces.backend.docker.labels import PORT, ROLE, SERVER

UID = 10001
"""Of the commands in a sandbox, as its user and its group."""
HOSTNAME = "sandbox"
WORKSPACE, FOLDER, OUTPUT, RUNTIME = "/workspace", "/run/agent", "/run/agent-output", "/opt/agent"
LEAST_MEMORY = "32m"
RUN = "rw,noexec,nosuid,nodev,size=8m,mode=755"
ENVIRONMENT: Mapping[str, str] = {
    "HOME": WORKSPACE,
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
"""Of the box; its commands have that of the image as well."""
TASK_CAPABILITIES = ("KILL", "SETGID", "SETPCAP", "SETUID")
SEALED = 4_000_000_000
"""Owns the folder of the socket of a task, whose commands may be anybody with a lower number."""
RESERVED = (WORKSPACE, FOLDER, OUTPUT, RUNTIME, "/tmp", "/run")
KERNEL = ("/proc", "/sys", "/dev")

SERVER_PORT = 8000
KEY_NAME = "AGENT_SERVER_API_KEY"
SERVER_LEAST_MEMORY = "64m"
PIDS = 4096
"""Processes and threads at a time, where nobody says otherwise."""
SERVER_CAPABILITIES = ("CHOWN", "KILL", "SETGID", "SETPCAP", "SETUID")
"""What the image's start needs to run commands as another user than the server. Commands have none."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}")
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

Propagation = Literal["rprivate", "rslave"]
"""Engines want `rslave` for folders that are their own, such as those of volumes."""


class Bind(Struct, frozen=True):
    """A folder of the engine's machine in a container."""

    source: str
    target: str
    read_only: bool = False
    propagation: Propagation = "rprivate"

    def mount(self) -> dict[str, Any]:
        """Return it as the engine takes it."""
        how = {"Propagation": self.propagation}
        return {**_mount("bind", self.source, self.target, self.read_only), "BindOptions": how}


class Parts(Struct, frozen=True, kw_only=True):
    """What a sandbox is made from, besides what its user asked for."""

    image: str
    """Its id, so that a tag that is moved meanwhile changes nothing."""
    image_environment: tuple[str, ...]
    """The names in it; none of them reaches the box."""
    command: tuple[str, ...]
    binds: tuple[Bind, ...]
    labels: dict[str, str]
    runtime: str
    working_dir: str = WORKSPACE
    volumes: tuple[str, ...] = ()
    """Of the image, as far as it is to have them."""
    storage: dict[str, str] = {}
    """Options for the root, where it is writable and the engine can limit it."""


def create_body(spec: Sandbox, parts: Parts) -> dict[str, Any]:
    """Return the body of POST /containers/create.

    Raises:
        InvalidParams: a size makes no sense.
    """
    environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    # A name alone removes it: LD_PRELOAD of an image would be obeyed before any of our code runs.
    environment += [name for name in parts.image_environment if name not in ENVIRONMENT]
    return {
        "Image": parts.image,
        # The box of a task becomes the user itself, and keeps what it takes to run commands as others.
        "User": "0:0" if spec.profile == "task" else f"{UID}:{UID}",
        "Hostname": HOSTNAME,
        "WorkingDir": parts.working_dir,
        "Entrypoint": list(parts.command),
        "Cmd": [],
        "Env": environment,
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGTERM",
        "StopTimeout": 5,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "OpenStdin": False,
        "Tty": False,
        "Labels": parts.labels,
        "HostConfig": _host_config(spec, parts),
    }


def _host_config(spec: Sandbox, parts: Parts) -> dict[str, Any]:
    memory = parse_size("sandbox.memory", spec.memory, least=LEAST_MEMORY)
    return {
        "Privileged": False,
        **_common(memory, spec.cpus, spec.pids, spec.gpus, log=("1m", 2)),
        "CapAdd": list(TASK_CAPABILITIES) if spec.profile == "task" else [],
        "ReadonlyRootfs": spec.profile != "task",
        "StorageOpt": parts.storage,
        "Tmpfs": {"/run": RUN},
        "Mounts": [
            *(bind.mount() for bind in parts.binds),
            *({"Type": "volume", "Target": volume, "ReadOnly": False} for volume in parts.volumes),
        ],
        "NetworkMode": spec.network,
        "PublishAllPorts": False,
        "PortBindings": {},
        "Dns": [],
        # With a network the engine gives the name itself.
        "ExtraHosts": [f"{HOSTNAME}:127.0.0.1"] if spec.network == "none" else [],
        "Links": [],
        "IpcMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "UsernsMode": "",
        "CgroupnsMode": "private",
        "CgroupParent": "",
        "MemoryReservation": 0,
        "OomKillDisable": False,
        "OomScoreAdj": 500,
        "CpuShares": 256,
        "ShmSize": 16 << 20,
        # Not nproc: it counts all processes of this user, those in other sandboxes, too.
        "Ulimits": [
            _limit("nofile", 1024, 4096),
            _limit("core", 0),
            _limit("fsize", 2 << 30),
            _limit("memlock", 64 << 10),
            _limit("msgqueue", 0),
        ],
        "Init": False,  # ours is in the box, where no mount can take its place
        "AutoRemove": False,
        "Devices": [],
        "DeviceCgroupRules": [],
        "GroupAdd": [],
        "Sysctls": {},
        "VolumesFrom": [],
        "Binds": [],
        "Runtime": parts.runtime,
        # Absent are MaskedPaths and ReadonlyPaths: the engine's own lists apply, an empty one would unmask /proc.
    }


def _limit(name: str, soft: int, hard: int | None = None) -> dict[str, Any]:
    return {"Name": name, "Soft": soft, "Hard": soft if hard is None else hard}


def temporary(spec: Sandbox, image: str, volumes: Iterable[str]) -> list[str]:
    """Return the folders that are writable and do not last: `/tmp`, those asked for, and the volumes of the image.

    Raises:
        ImageUnavailable: a volume of the image would be where a sandbox cannot have one.
    """
    wanted = ["/tmp", *spec.writable]
    for volume in volumes:
        path = PurePosixPath(volume)
        inside = any(path.is_relative_to(place) for place in KERNEL)
        around = any(PurePosixPath(place).is_relative_to(path) for place in (RUNTIME, *KERNEL))
        if not path.is_absolute() or ".." in path.parts or str(path) != volume or inside or around:
            raise ImageUnavailable(
                f"the image has a volume at {volume[:200]!r}, where a sandbox cannot have one; build it without",
                image=image,
                phase="create",
            )
        if volume not in (*RESERVED, *wanted):
            wanted.append(volume)
    return wanted


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
        return _mount("bind" if self.is_folder else "volume", self.source, self.target, self.read_only)


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
        """Check that it makes sense, as far as the types of the arguments do not say so; nobody is asked.

        Raises:
            InvalidParams, PolicyDenied: it does not; the sentence names the field.
        """
        if not _NAME.fullmatch(self.name):
            raise InvalidParams(
                f"name: {self.name!r} is no name of a container; use letters, digits, dots, - and _"
            )
        if self.memory is not None:
            parse_size("memory", self.memory, least=SERVER_LEAST_MEMORY)
        if self.cpus is not None and not 0.01 <= self.cpus <= 1024:
            raise InvalidParams(f"cpus: {self.cpus} must be between 0.01 and 1024")
        if self.pids is not None and not 32 <= self.pids <= 1 << 22:
            raise InvalidParams(f"pids: {self.pids} must be between 32 and {1 << 22}")
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
            **_common(memory, self.cpus or 0, self.pids or PIDS, self.gpus, log=("10m", 3)),
            "CapAdd": list(SERVER_CAPABILITIES),
            "NetworkMode": self.network or "default",
            "PortBindings": {} if bind is None else self._published(bind),
            "Mounts": [volume.mount() for volume in self.volumes],
            "GroupAdd": [] if self.group is None else [str(self.group)],
            **({"Runtime": self.runtime} if self.runtime else {}),
        }

    def _published(self, bind: str) -> dict[str, Any]:
        own = "" if self.host_port is None else str(self.host_port)
        further = {f"{port}/tcp": [{"HostIp": bind, "HostPort": ""}] for port in self.ports}
        return {**further, f"{self.port}/tcp": [{"HostIp": bind, "HostPort": own}]}


def _common(memory: int, cpus: float, pids: int, gpus: str | None, *, log: tuple[str, int]) -> dict[str, Any]:
    """What both kinds have: no more rights than they were given, limits, and no life after their end."""
    size, files = log
    return {
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": round(cpus * 1_000_000_000),
        "PidsLimit": pids,
        "DeviceRequests": [] if gpus is None else [_gpus(gpus)],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": size, "max-file": str(files)}},
        "RestartPolicy": {"Name": "no"},
    }


def _gpus(wanted: str) -> dict[str, Any]:
    """What `docker run --gpus` asks for."""
    request: dict[str, Any] = {"Driver": "", "Capabilities": [["gpu"]]}
    if wanted == "all" or wanted.isdecimal():
        return {**request, "Count": -1 if wanted == "all" else int(wanted)}
    return {**request, "DeviceIDs": wanted.split(",")}


def _mount(kind: str, source: str, target: str, read_only: bool) -> dict[str, Any]:
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": read_only}


def parse_size(field: str, text: str, *, least: str = "1b") -> int:
    """Return bytes for a number with a unit of `b`, `k`, `m`, `g` or `t` (powers of 1024).

    Raises:
        InvalidParams: it is no size, or below `least`; the sentence names the field.
    """
    size = _bytes(text)
    if size is None:
        raise InvalidParams(f"{field}: {text[:64]!r} is no size; write a number and a unit, like 512m")
    if size < (_bytes(least) or 0):
        raise InvalidParams(f"{field}: {text} is too small; give it {least} or more")
    return size


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([bkmgt]?)(?:i?b)?", text.strip().lower())
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
