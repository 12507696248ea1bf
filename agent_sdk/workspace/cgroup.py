"""The control group of this process, of version 1 or 2: its limits, and how often they were run into."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

_NONE_AT_LEAST = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""


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
