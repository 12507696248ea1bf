"""What containers are to the engine: those with a box (a sandbox), and those with a server; each with its hardening.

Of a sandbox the whole request is built from nothing but our own knobs. Nothing that a client wrote gets into a field it
was not meant for: there is no way to name a capability, a device, a host's namespace or a path that is not allowed.
After the start the request is compared with what the engine made of it (`verification`), because engines drop what they
do not support with a warning that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from msgspec import Struct

from agent_sdk.protocol.errors import ImageUnavailable
from agent_sdk.protocol.specs import Sandbox
from workspaces.backend.contract import Machine, Mount, parse_size
from workspaces.backend.labels import PORT, ROLE, SERVER

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

PIDS = 4096
"""Processes and threads at a time, where nobody says otherwise."""
SERVER_CAPABILITIES = ("CHOWN", "KILL", "SETGID", "SETPCAP", "SETUID")
"""What the image's start needs to run commands as another user than the server. Commands have none."""

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


def server_body(
    machine: Machine, *, storage: str | None, bind: str | None, network: str | None
) -> dict[str, Any]:
    """Return the body of POST /containers/create for a machine with a server.

    Args:
        machine: what it is to be.
        storage: where it stores what it stores: a volume, or a folder of the engine's machine.
        bind: the address on which ports are published; None: none is.
        network: which it is in; None: the engine's default.
    """
    env = {**machine.env, **machine.secret_env}
    body: dict[str, Any] = {
        "Image": machine.image,
        "Env": [f"{name}={value}" for name, value in env.items()],
        "Labels": {**machine.labels, ROLE: SERVER, PORT: str(machine.ports[0])},
        "ExposedPorts": {f"{port}/tcp": {} for port in machine.ports},
        "HostConfig": {
            **_common(
                machine.memory or 0, machine.cpus or 0, machine.pids or PIDS, machine.gpus, log=("10m", 3)
            ),
            "CapAdd": list(SERVER_CAPABILITIES),
            "NetworkMode": network or "default",
            "PortBindings": {} if bind is None else _published(machine, bind),
            "Mounts": [
                _mount("bind" if mount.is_folder else "volume", mount.source, mount.target, mount.read_only)
                for mount in folders(machine, storage)
            ],
            "GroupAdd": [] if machine.group is None else [str(machine.group)],
            **({"Runtime": machine.runtime} if machine.runtime else {}),
        },
    }
    if machine.command is not None:
        body |= {"Entrypoint": list(machine.command), "Cmd": []}
    if machine.working_dir is not None:
        body["WorkingDir"] = machine.working_dir
    if machine.user is not None:
        body["User"] = str(machine.user)
    return body


def folders(machine: Machine, storage: str | None) -> tuple[Mount, ...]:
    """Return what is mounted into a machine, where it stores what it stores included."""
    if machine.storage is None or storage is None:
        return machine.mounts
    return (*machine.mounts, Mount(storage, machine.storage.target))


def _published(machine: Machine, bind: str) -> dict[str, Any]:
    own = "" if machine.host_port is None else str(machine.host_port)
    first, *further = machine.ports
    ports = {f"{port}/tcp": [{"HostIp": bind, "HostPort": ""}] for port in further}
    return {**ports, f"{first}/tcp": [{"HostIp": bind, "HostPort": own}]}


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
