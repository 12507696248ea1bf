"""What a sandbox is to the engine: the whole request that creates it, built from nothing but our own knobs.

Nothing that a client wrote gets into a field it was not meant for: there is no way to name a capability, a device,
a host's namespace or a path that is not allowed. After the start the request is compared with what the engine made
of it (`verification`), because engines drop what they do not support with a warning that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from msgspec import Struct

from agent_sdk.protocol.errors import ImageUnavailable
from agent_sdk.protocol.specs import Sandbox
from workspaces.backend.sizes import parse_size

UID = 10001
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


Propagation = Literal["rprivate", "rslave"]
"""Engines want `rslave` for folders that are their own, such as those of volumes."""


class Bind(Struct, frozen=True):
    """A folder of the engine's machine in a container."""

    source: str
    target: str
    read_only: bool = False
    propagation: Propagation = "rprivate"


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
        "CapDrop": ["ALL"],
        "CapAdd": list(TASK_CAPABILITIES) if spec.profile == "task" else [],
        "SecurityOpt": ["no-new-privileges:true"],
        "ReadonlyRootfs": spec.profile != "task",
        "StorageOpt": parts.storage,
        "Tmpfs": {"/run": RUN},
        "Mounts": [
            *(_mount(bind) for bind in parts.binds),
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
        "Memory": memory,
        "MemorySwap": memory,
        "MemoryReservation": 0,
        "OomKillDisable": False,
        "OomScoreAdj": 500,
        "NanoCpus": round(spec.cpus * 1_000_000_000),
        "CpuShares": 256,
        "PidsLimit": spec.pids,
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
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "2"}},
        "Devices": [],
        "DeviceCgroupRules": [],
        "DeviceRequests": _gpus(spec.gpus),
        "GroupAdd": [],
        "Sysctls": {},
        "VolumesFrom": [],
        "Binds": [],
        "Runtime": parts.runtime,
        # Absent are MaskedPaths and ReadonlyPaths: the engine's own lists apply, an empty one would unmask /proc.
    }


def _mount(bind: Bind) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": bind.source,
        "Target": bind.target,
        "ReadOnly": bind.read_only,
        "BindOptions": {"Propagation": bind.propagation},
    }


def _limit(name: str, soft: int, hard: int | None = None) -> dict[str, Any]:
    return {"Name": name, "Soft": soft, "Hard": soft if hard is None else hard}


def _gpus(wanted: str | None) -> list[dict[str, Any]]:
    if wanted is None:
        return []
    which: dict[str, Any]
    if wanted == "all":
        which = {"Count": -1}
    elif wanted.isdecimal():
        which = {"Count": int(wanted)}
    else:
        which = {"DeviceIDs": wanted.split(",")}
    return [{"Driver": "", "Capabilities": [["gpu"]], **which}]


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
