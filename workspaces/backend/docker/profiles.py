"""What containers are to the engine: those with a box (a sandbox), and those with a server; each with its hardening.

Of a sandbox the whole request is built from nothing but our own knobs. Nothing that a client wrote gets into a field it
was not meant for: there is no way to name a capability, a device, a host's namespace or a path that is not allowed.
After the start the request is compared with what the engine made of it, because engines drop what they do not support
with a warning that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from workspaces.backend.contract import HOSTNAME, TEMPORARY, UID, Machine, Mount
from workspaces.backend.labels import PORT, ROLE, SERVER

RUN = "rw,noexec,nosuid,nodev,size=8m,mode=755"
TASK_CAPABILITIES = ("KILL", "SETGID", "SETPCAP", "SETUID")

PIDS = 4096
"""Processes and threads at a time, where nobody says otherwise."""
SERVER_CAPABILITIES = ("CHOWN", "KILL", "SETGID", "SETPCAP", "SETUID")
"""What the image's start needs to run commands as another user than the server. Commands have none."""

Propagation = Literal["rprivate", "rslave"]
"""Engines want `rslave` for folders that are their own, such as those of volumes."""
Place = Callable[[Mount], tuple[str, Propagation]]
"""Says what the engine calls the source of a mount, and how what is mounted below it later is passed on."""


def box_body(machine: Machine, place: Place) -> dict[str, Any]:
    """Return the body of POST /containers/create for a machine with a box."""
    return {
        "Image": machine.image,
        # The box of a task becomes the user itself, and keeps what it takes to run commands as others.
        "User": "0:0" if machine.profile == "task" else f"{UID}:{UID}",
        "Hostname": HOSTNAME,
        "WorkingDir": machine.working_dir or "/",
        "Entrypoint": list(machine.command or ()),
        "Cmd": [],
        # A name alone removes it.
        "Env": [*(f"{name}={value}" for name, value in machine.env.items()), *machine.without_env],
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGTERM",
        "StopTimeout": 5,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "OpenStdin": False,
        "Tty": False,
        "Labels": dict(machine.labels),
        "HostConfig": _host_config(machine, place),
    }


def _host_config(machine: Machine, place: Place) -> dict[str, Any]:
    is_task, network = machine.profile == "task", machine.network or "none"
    return {
        "Privileged": False,
        **_common(machine, log=("1m", 2)),
        "CapAdd": list(TASK_CAPABILITIES) if is_task else [],
        "ReadonlyRootfs": not is_task,
        "StorageOpt": {} if machine.root_size is None else {"size": str(machine.root_size)},
        "Tmpfs": dict.fromkeys(TEMPORARY, RUN),
        "Mounts": [
            *(_bind(mount, *place(mount)) for mount in machine.mounts),
            *({"Type": "volume", "Target": volume, "ReadOnly": False} for volume in machine.volumes),
        ],
        "NetworkMode": network,
        "PublishAllPorts": False,
        "PortBindings": {},
        "Dns": [],
        # With a network the engine gives the name itself.
        "ExtraHosts": [f"{HOSTNAME}:127.0.0.1"] if network == "none" else [],
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
        **({"Runtime": machine.runtime} if machine.runtime else {}),
        # Absent are MaskedPaths and ReadonlyPaths: the engine's own lists apply, an empty one would unmask /proc.
    }


def _limit(name: str, soft: int, hard: int | None = None) -> dict[str, Any]:
    return {"Name": name, "Soft": soft, "Hard": soft if hard is None else hard}


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
            **_common(machine, log=("10m", 3)),
            "CapAdd": list(SERVER_CAPABILITIES),
            "NetworkMode": network or "default",
            "PortBindings": {} if bind is None else _published(machine, bind),
            "Mounts": [
                {
                    "Type": "bind" if mount.is_folder else "volume",
                    "Source": mount.source,
                    "Target": mount.target,
                    "ReadOnly": mount.read_only,
                }
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


def _common(machine: Machine, *, log: tuple[str, int]) -> dict[str, Any]:
    """What all kinds have: no more rights than they were given, limits, and no life after their end."""
    (size, files), memory = log, machine.memory or 0
    return {
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": round((machine.cpus or 0) * 1_000_000_000),
        "PidsLimit": machine.pids or PIDS,
        "DeviceRequests": [] if machine.gpus is None else [_gpus(machine.gpus)],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": size, "max-file": str(files)}},
        "RestartPolicy": {"Name": "no"},
    }


def _gpus(wanted: str) -> dict[str, Any]:
    """What `docker run --gpus` asks for."""
    request: dict[str, Any] = {"Driver": "", "Capabilities": [["gpu"]]}
    if wanted == "all" or wanted.isdecimal():
        return {**request, "Count": -1 if wanted == "all" else int(wanted)}
    return {**request, "DeviceIDs": wanted.split(",")}


def _bind(mount: Mount, source: str, propagation: Propagation) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": mount.target,
        "ReadOnly": mount.read_only,
        "BindOptions": {"Propagation": propagation},
    }


def differences(body: Mapping[str, Any], inspected: Mapping[str, Any]) -> list[str]:
    """Return what the engine made of a request in another way than asked, one phrase each."""
    sent = {name: value for name, value in body.items() if name != "HostConfig"}
    got = inspected.get("Config") or {}
    return [
        *_compare("", sent, got),
        *_compare("HostConfig.", body["HostConfig"], inspected.get("HostConfig") or {}),
    ]


def _compare(where: str, sent: Mapping[str, Any], got: Mapping[str, Any]) -> Iterator[str]:
    for name, wanted in sent.items():
        if not _same(wanted, got.get(name)) and not _is_harmless(name, wanted, got.get(name)):
            yield f"{where}{name}: {got.get(name)!r:.200} instead of {wanted!r:.200}"


def _same(sent: Any, got: Any) -> bool:
    """Whether they mean the same; engines write an empty value as null, or leave it out."""
    if not sent and not got:
        return True
    if isinstance(sent, dict) and isinstance(got, dict):
        return all(_same(sent.get(name), got.get(name)) for name in {*sent, *got})
    if isinstance(sent, list) and isinstance(got, list):
        return len(sent) == len(got) and all(map(_same, sent, got))
    return bool(sent == got)


def _is_harmless(name: str, sent: Any, got: Any) -> bool:
    """What an image adds, where that has no effect; a kernel without accounting of swap limits the memory, too."""
    if name in ("Labels", "Healthcheck", "ExposedPorts"):
        return isinstance(got, dict) and sent.items() <= got.items()
    return (name, sent, got) == ("NetworkMode", "default", "bridge") or (name, got) == ("MemorySwap", -1)
