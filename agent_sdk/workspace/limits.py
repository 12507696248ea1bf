"""What the kernel lets this process and all it starts do: its limits, when something ran into one, and its rights.

The kernel counts what it killed for want of memory and which processes it did not start; nothing tells of it.
So the counters are looked at whenever a command or a call has ended. Only /proc and /sys are read; what cannot
be read is not known, and nothing here raises for it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple, TypeVar

from agent_sdk.protocol.methods.workspace import LimitReached
from agent_sdk.protocol.results import Mount, Profile

FULL_BYTES = 1 << 20
"""A disk with less room than this, and than an eighth of it, is full: programs write in large pieces."""

_DIES_FIRST = b"1000"
_NONE_AT_LEAST = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""
_RESTRICTIONS = ("ro", "nosuid", "nodev", "noexec")

Limit = Literal["memory", "pids", "disk"]
_LIMITS: tuple[Limit, ...] = ("memory", "pids", "disk")
T = TypeVar("T")


class Counts(NamedTuple):
    """How often limits were run into, at one moment."""

    oom_kills: int = 0
    refused_forks: int = 0
    disk_full: bool = False


class LimitWatch:
    """What this process, and all it starts, may use."""

    def __init__(self, folder: str) -> None:
        """Begin to watch; `folder` is on the disk that may become full."""
        self.on_reached: Callable[[LimitReached], None] = _nobody
        """Called by `look` with what it found."""
        self._folder = folder
        self._cgroup = Cgroup()
        self._seen = self._counts()

    def look(self) -> Counts:
        """Tell of what was run into since the last look. Blocks for some reads of /sys/fs/cgroup."""
        before, self._seen = self._seen, self._counts()
        for limit, happened in zip(_LIMITS, self._since(before), strict=True):
            if happened:
                self._reached(limit)
        return self._seen

    def found_full(self) -> None:
        """Tell that something could not be written; what was written of it may be gone again."""
        if not self.look().disk_full:
            self._reached("disk")

    def _reached(self, limit: Limit) -> None:
        self.on_reached(LimitReached(limit=limit, detail=self._detail(limit)))

    def why(self, before: Counts, exit_code: int | None) -> str:
        """Say which limit may be why a process that was started at `before` failed; empty: none.

        None: it was killed.
        """
        now = self.look()
        killed, refused, _ = self._since(before)
        if killed:  # maybe a part of it alone: then its exit code says nothing
            return f"killed: {self._detail('memory')}"
        if exit_code == 0:
            return ""
        if refused:
            return self._detail("pids")
        return self._detail("disk") if now.disk_full else ""

    def expose(self, pid: int) -> None:
        """Have the kernel kill this process and what comes of it before the box, when there is no memory left."""
        with suppress(OSError):  # it has ended, or became another user's
            descriptor = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, _DIES_FIRST)
            finally:
                os.close(descriptor)

    def _since(self, before: Counts) -> tuple[bool, bool, bool]:
        now = self._seen
        return (
            now.oom_kills > before.oom_kills,
            now.refused_forks > before.refused_forks,
            now.disk_full and not before.disk_full,
        )

    def _counts(self) -> Counts:
        return Counts(self._cgroup.oom_kills, self._cgroup.refused_forks, self._is_full())

    def _is_full(self) -> bool:
        try:
            state = os.statvfs(self._folder)
        except OSError:
            return False
        full = state.f_bavail * state.f_frsize < min(FULL_BYTES, state.f_blocks * state.f_frsize // 8)
        return full or (state.f_files > 0 and state.f_favail == 0)

    def _detail(self, limit: Limit) -> str:
        match limit:
            case "memory":
                return f"out of memory{_of(self._cgroup.memory_max, 'MiB')}"
            case "pids":
                return f"no more processes can be started{_of(self._cgroup.pids_max, 'processes')}"
        return f"no space left on the disk of {self._folder}"


def _nobody(notice: LimitReached) -> None:
    pass


def _of(limit: int | None, unit: str) -> str:
    if limit is None:
        return ""
    return f" (limit {limit / (1 << 20) if unit == 'MiB' else limit:g} {unit})"


class MountPoint(NamedTuple):
    """A line of /proc/self/mountinfo."""

    root: str
    """What of the file system is mounted."""
    target: str
    options: tuple[str, ...]
    kind: str
    super_options: tuple[str, ...]


def mount_points(process: str = "/proc/self") -> list[MountPoint]:
    """Return what is mounted for a process, in the order of mounting.

    Raises:
        OSError: there is no /proc.
    """
    found = []
    with open(f"{process}/mountinfo") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            root, target, options = fields.split()[3:6]
            kind, _, super_options = rest.split()[:3]
            target = os.fsdecode(os.fsencode(target).decode("unicode_escape").encode("latin-1"))
            found.append(
                MountPoint(root, target, tuple(options.split(",")), kind, tuple(super_options.split(",")))
            )
    return found


class Cgroup:
    """Values that cannot be read are None: there is no such limit, or it is not known."""

    def __init__(self, process: str = "/proc/self") -> None:
        """Find that of a process. Blocks for a millisecond; what cannot be read is as if it were not there."""
        self._folders: dict[str, str] = {}
        with suppress(OSError, ValueError):
            self._find(process)

    def _find(self, process: str) -> None:
        """Version 2 is one folder with the controllers that version 1 does not have."""
        with open(f"{process}/cgroup") as lines:
            paths = {
                name: path
                for _, names, path in (line.strip().split(":", 2) for line in lines)
                for name in names.split(",")
            }
        for mount in mount_points(process):
            if mount.kind == "cgroup2":
                names = [""]
            elif mount.kind == "cgroup":
                names = [name for name in mount.super_options if name in paths]
            else:
                continue
            for name in names:
                below = os.path.relpath(paths.get(name, "/"), mount.root)
                self._folders[name] = (
                    mount.target if below.startswith("..") else os.path.join(mount.target, below)
                )

    @property
    def memory_max(self) -> int | None:
        """Bytes."""
        return _limit(self._read("memory", "memory.limit_in_bytes", "memory.max"))

    @property
    def pids_max(self) -> int | None:
        """How many processes and threads there may be."""
        return _limit(self._read("pids", "pids.max", "pids.max"))

    @property
    def cpus(self) -> float | None:
        """How many processors' worth of time."""
        quota = self._read("cpu", "cpu.cfs_quota_us", "cpu.max").split()
        period = quota[1:] or self._read("cpu", "cpu.cfs_period_us", "").split()
        if not quota or not period or not quota[0].isdigit():
            return None
        return int(quota[0]) / int(period[0])

    @property
    def oom_kills(self) -> int:
        """How often a process was killed because there was no memory left."""
        return _count(self._read("memory", "memory.oom_control", "memory.events"), "oom_kill")

    @property
    def refused_forks(self) -> int:
        """How often a process could not be started because there were too many."""
        return _count(self._read("pids", "pids.events", "pids.events"), "max")

    def _read(self, controller: str, name: str, name_of_version_2: str) -> str:
        folder = self._folders.get(controller)
        if folder is None:
            folder, name = self._folders.get("", ""), name_of_version_2
        try:
            with open(os.path.join(folder, name)) as file:
                return file.read().strip()
        except OSError:
            return ""


def _limit(text: str) -> int | None:
    return int(text) if text.isdigit() and int(text) < _NONE_AT_LEAST else None


def _count(text: str, name: str) -> int:
    counts = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    return int(counts.get(name, 0))


def present_profile() -> Profile:
    """Return it, of limits the highest that a program could give itself. Blocks for a millisecond."""
    status = _known(_status) or {}
    mounts = _known(_mounts) or ()
    root = [mount.options for mount in mounts if mount.target == "/"]
    cgroup = Cgroup()
    return Profile(
        uid=os.geteuid(),
        gid=os.getegid(),
        groups=tuple(sorted(os.getgroups())),
        capabilities=status.get("CapEff", ""),
        capabilities_bound=status.get("CapBnd", ""),
        no_new_privileges=status.get("NoNewPrivs") == "1",
        seccomp=int(status.get("Seccomp", 0)),
        seccomp_filters=int(status.get("Seccomp_filters", 0)),
        read_only_root=bool(root) and "ro" in root[-1],
        pids_max=cgroup.pids_max,
        memory_max=cgroup.memory_max,
        cpus=cgroup.cpus,
        open_files=_highest(resource.RLIMIT_NOFILE),
        file_bytes=_highest(resource.RLIMIT_FSIZE),
        interfaces=_known(_interfaces) or (),
        mounts=mounts,
        kernel=_known(_kernel) or "",
    )


def _known(look: Callable[[], T]) -> T | None:
    with suppress(OSError, ValueError, IndexError):
        return look()
    return None


def _status() -> dict[str, str]:
    with open("/proc/self/status") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _mounts() -> tuple[Mount, ...]:
    return tuple(
        Mount(
            target=mount.target,
            **_what_is_at(mount.target),
            kind=mount.kind,
            options=tuple(
                each
                for each in _RESTRICTIONS
                if each in mount.options or (each == "ro" and each in mount.super_options)
            ),
        )
        for mount in mount_points()
    )


def _what_is_at(target: str) -> dict[str, int]:
    if target.startswith(("/proc", "/sys", "/dev")):
        return {}
    with suppress(OSError):
        found = os.lstat(target)
        return {"device": found.st_dev, "inode": found.st_ino}
    return {}


def _highest(number: int) -> int | None:
    highest = resource.getrlimit(number)[1]
    return None if highest == resource.RLIM_INFINITY else highest


def _interfaces() -> tuple[str, ...]:
    with open("/proc/net/dev") as lines:
        return tuple(line.partition(":")[0].strip() for line in lines if ":" in line)


def _kernel() -> str:
    with open("/proc/version") as version:
        return version.read().partition(" (")[0].strip()
