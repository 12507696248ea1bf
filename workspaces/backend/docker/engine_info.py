"""What an engine says of itself and of what a container uses, as plain data; and which of its runtimes can be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Self

import msgspec
from msgspec import Struct, field

from agent_sdk.protocol.errors import EngineUnavailable, IsolationUnavailable
from agent_sdk.protocol.results import Usage

UNLIMITED = 1 << 62
"""What counts as no limit: engines answer with the largest number, or nearly so."""
GVISOR = "runsc"
REACHED_BY = ({"--host-uds=all", "--host-uds=create"}, {"--host-fifo=open"})
"""What gVisor needs to be told, so that the box can listen in a folder of this machine."""
_LIMITING = ("btrfs", "devicemapper", "zfs")


class _Component(Struct):
    name: str = field(name="Name")
    version: str = field(name="Version", default="")


class _Runtime(Struct):
    arguments: tuple[str, ...] | None = field(name="runtimeArgs", default=None)


class EngineInfo(Struct, frozen=True, kw_only=True):
    """An engine and the machine it runs on, by what it answers to /version and /info."""

    version: str = field(name="Version")
    api: str = field(name="ApiVersion")
    os: str = field(name="Os")
    arch: str = field(name="Arch")
    """As images name it: amd64, arm64, …"""
    kernel: str = field(name="KernelVersion", default="")
    components: tuple[_Component, ...] = field(name="Components")
    name: str = field(name="Name")
    """Of its machine."""
    time: datetime | None = field(name="SystemTime", default=None)
    cpus: int = field(name="NCPU", default=0)
    memory: int = field(name="MemTotal", default=0)
    """Bytes."""
    cgroups: str = field(name="CgroupVersion", default="")
    runtime_options: Mapping[str, _Runtime] = field(name="Runtimes", default_factory=dict)
    default_runtime: str = field(name="DefaultRuntime", default="")
    security_options: tuple[str, ...] = field(name="SecurityOptions", default=())
    """E.g. `name=seccomp,profile=default`, `name=rootless`."""
    live_restore: bool = field(name="LiveRestoreEnabled", default=False)
    """Whether containers survive the engine's end."""
    root_dir: str = field(name="DockerRootDir", default="")
    driver: str = field(name="Driver", default="")
    """Of images and layers."""
    driver_status: tuple[tuple[str, ...], ...] = field(name="DriverStatus", default=())
    registry: str = field(name="IndexServerAddress", default="")
    """Where images come from whose names have no host."""
    logging_driver: str = field(name="LoggingDriver", default="")
    memory_limit: bool = field(name="MemoryLimit", default=True)
    swap_limit: bool = field(name="SwapLimit", default=True)
    cpu_limit: bool = field(name="CpuCfsQuota", default=True)
    pids_limit: bool = field(name="PidsLimit", default=True)

    @classmethod
    def from_answers(cls, version: Mapping[str, Any], about: Any) -> Self:
        """Take what /version and /info answered.

        Raises:
            EngineUnavailable: that makes no sense.
        """
        try:
            said = {name: value for name, value in {**about, **version}.items() if value is not None}
            return msgspec.convert(said, cls)
        except (msgspec.ValidationError, TypeError) as exc:
            raise EngineUnavailable(
                f"what answers is no container engine: its description makes no sense ({exc}): look at DOCKER_HOST",
                phase="engine",
            ) from None

    @property
    def clock(self) -> int:
        """When it said so: nanoseconds since the Unix epoch, by its clock."""
        return int(self.time.timestamp() * 1e9) if self.time is not None else 0

    @property
    def cgroup_version(self) -> str:
        """Which kind of control groups its kernel has."""
        return self.cgroups or "1"

    @property
    def runtimes(self) -> Mapping[str, tuple[str, ...]]:
        """Each runtime with the arguments it is started with."""
        return {name: self.runtime_options[name].arguments or () for name in sorted(self.runtime_options)}

    @property
    def runc(self) -> str:
        """Version of runc; empty where it does not say."""
        return {part.name: part.version for part in self.components}.get("runc", "")

    @property
    def backing(self) -> str:
        """The file system below images and layers, where the driver says it."""
        return {line[0]: line[-1] for line in self.driver_status if line}.get("Backing Filesystem", "")

    @property
    def limits_roots(self) -> bool:
        """Whether the driver may limit what a container writes into its root; for one on xfs only trying tells."""
        return self.driver in _LIMITING or (self.driver, self.backing) == ("overlay2", "xfs")

    @property
    def unlimited(self) -> tuple[str, ...]:
        """What its kernel cannot limit: memory, swap, cpu, pids."""
        return tuple(name for name in ("memory", "swap", "cpu", "pids") if not getattr(self, f"{name}_limit"))


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
