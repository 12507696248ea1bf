"""What an engine says of itself and of what a container uses, as plain data; and which of its runtimes can be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Self

import msgspec
from msgspec import Struct

from agent_sdk.protocol.errors import EngineUnavailable, IsolationUnavailable
from agent_sdk.protocol.results import Usage

UNLIMITED = 1 << 62
"""What counts as no limit: engines answer with the largest number, or nearly so."""
GVISOR = "runsc"
REACHED_BY = ({"--host-uds=all", "--host-uds=create"}, {"--host-fifo=open"})
"""What gVisor needs to be told, so that the box can listen in a folder of this machine."""
_LIMITING = ("btrfs", "devicemapper", "zfs")


class EngineInfo(Struct, frozen=True, kw_only=True):
    """An engine and the machine it runs on."""

    version: str
    api: str
    os: str
    arch: str
    """As images name it: amd64, arm64, …"""
    name: str
    """Of its machine."""
    clock: int = 0
    """When it said so: nanoseconds since the Unix epoch, by its clock."""
    kernel: str = ""
    cpus: int = 0
    memory: int = 0
    """Bytes."""
    cgroup_version: str = "1"
    runtimes: Mapping[str, tuple[str, ...]] = {}
    """Each with the arguments it is started with."""
    default_runtime: str = ""
    runc: str = ""
    """Its version."""
    security_options: tuple[str, ...] = ()
    """E.g. `name=seccomp,profile=default`, `name=rootless`."""
    live_restore: bool = False
    """Whether containers survive the engine's end."""
    root_dir: str = ""
    driver: str = ""
    """Of images and layers."""
    backing: str = ""
    """The file system below, where the driver says it."""
    limits_roots: bool = False
    """Whether the driver may limit what a container writes into its root; for one on xfs only trying tells."""
    registry: str = ""
    """Where images come from whose names have no host."""
    logging_driver: str = ""
    unlimited: tuple[str, ...] = ()
    """What its kernel cannot limit: memory, swap, cpu, pids."""

    @classmethod
    def from_answers(cls, version: Mapping[str, Any], about: Any) -> Self:
        """Take what /version and /info answered.

        Raises:
            EngineUnavailable: that makes no sense.
        """
        try:
            said = msgspec.convert(about, _Info)
            status = {line[0]: line[-1] for line in said.driver_status or [] if line}
            backing = status.get("Backing Filesystem", "")
            components = {str(part.get("Name")): str(part.get("Version")) for part in version["Components"]}
            return cls(
                version=str(version["Version"]),
                api=str(version["ApiVersion"]),
                os=str(version["Os"]),
                arch=str(version["Arch"]),
                kernel=str(version.get("KernelVersion", "")),
                name=said.name,
                clock=int(said.time.timestamp() * 1e9) if said.time else 0,
                cpus=said.cpus,
                memory=said.memory,
                cgroup_version=said.cgroup_version or "1",
                runtimes={name: tuple(said.runtimes[name].arguments or ()) for name in sorted(said.runtimes)},
                default_runtime=said.default_runtime,
                runc=components.get("runc", ""),
                security_options=tuple(said.security_options or ()),
                live_restore=said.live_restore,
                root_dir=said.root_dir,
                driver=said.driver,
                backing=backing,
                limits_roots=said.driver in _LIMITING or (said.driver, backing) == ("overlay2", "xfs"),
                registry=said.registry,
                logging_driver=said.logging_driver,
                unlimited=tuple(name for name, limited in said.limits() if not limited),
            )
        except (msgspec.ValidationError, LookupError, TypeError, AttributeError) as exc:
            raise EngineUnavailable(
                f"what answers is no container engine: its description makes no sense ({exc}): look at DOCKER_HOST",
                phase="engine",
            ) from None


class _Runtime(Struct):
    arguments: list[str] | None = msgspec.field(name="runtimeArgs", default=None)


class _Info(Struct):
    name: str = msgspec.field(name="Name")
    time: datetime | None = msgspec.field(name="SystemTime", default=None)
    cpus: int = msgspec.field(name="NCPU", default=0)
    memory: int = msgspec.field(name="MemTotal", default=0)
    cgroup_version: str = msgspec.field(name="CgroupVersion", default="1")
    runtimes: dict[str, _Runtime] = msgspec.field(name="Runtimes", default_factory=dict)
    default_runtime: str = msgspec.field(name="DefaultRuntime", default="")
    security_options: list[str] | None = msgspec.field(name="SecurityOptions", default=None)
    live_restore: bool = msgspec.field(name="LiveRestoreEnabled", default=False)
    root_dir: str = msgspec.field(name="DockerRootDir", default="")
    driver: str = msgspec.field(name="Driver", default="")
    driver_status: list[list[str]] | None = msgspec.field(name="DriverStatus", default=None)
    registry: str = msgspec.field(name="IndexServerAddress", default="")
    logging_driver: str = msgspec.field(name="LoggingDriver", default="")
    memory_limit: bool = msgspec.field(name="MemoryLimit", default=True)
    swap_limit: bool = msgspec.field(name="SwapLimit", default=True)
    cpu_limit: bool = msgspec.field(name="CpuCfsQuota", default=True)
    pids_limit: bool = msgspec.field(name="PidsLimit", default=True)

    def limits(self) -> list[tuple[str, bool]]:
        """Each with whether it can be set."""
        limits = {"memory": self.memory_limit, "swap": self.swap_limit}
        return list({**limits, "cpu": self.cpu_limit, "pids": self.pids_limit}.items())


def usage_of(stats: Any) -> Usage:
    """Take what /stats answered; None where it does not say."""
    memory, pids = _part(stats, "memory_stats"), _part(stats, "pids_stats")
    counters = _part(memory, "stats")
    cpu = _number(_part(_part(stats, "cpu_stats"), "cpu_usage").get("total_usage"))
    used = _number(memory.get("usage"))
    # The names of cgroup v1 and v2; without them it all counts.
    cache = _number(counters.get("total_inactive_file")) or _number(counters.get("inactive_file")) or 0
    return Usage(
        cpu_seconds=cpu / 1e9 if used is not None and cpu is not None else None,
        memory=None if used is None else max(0, used - cache),
        memory_max=_number(memory.get("limit")),
        pids=_number(pids.get("current")),
        pids_max=_number(pids.get("limit")),
    )


def _part(whole: Any, name: str) -> Mapping[str, Any]:
    part = whole.get(name) if isinstance(whole, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value < UNLIMITED else None


def usable_runtime(info: EngineInfo, wanted: str) -> str:
    """Return the runtime that was asked for; never another one.

    Raises:
        IsolationUnavailable: the engine has none of this name, or nothing could reach a sandbox in it.
    """
    if wanted not in info.runtimes:
        raise IsolationUnavailable(
            f"the engine has no runtime {wanted}; install it and name it in the engine's daemon.json, "
            f"or ask for one of: {', '.join(sorted(info.runtimes))}",
            wanted=wanted,
        )
    if wanted == GVISOR and not reaches_sandboxes(info.runtimes[wanted]):
        raise IsolationUnavailable(
            f"the engine's runtime {wanted} lets nothing reach a sandbox; give it the arguments "
            "--host-uds=all and --host-fifo=open in the engine's daemon.json",
            wanted=wanted,
        )
    return wanted


def reaches_sandboxes(arguments: Iterable[str]) -> bool:
    """Whether gVisor, started with these arguments, lets the box listen in a folder of this machine."""
    return all(not either.isdisjoint(arguments) for either in REACHED_BY)
