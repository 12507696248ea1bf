"""What is in force for this process and all it starts, as the kernel tells it: of a box, its rights and limits.

Only /proc and /sys are read. What cannot be read is not known; nothing here raises for it.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from agent_sdk.protocol.results import Mount, Profile
from agent_sdk.workspace.cgroup import Cgroup, mount_points

_RESTRICTIONS = ("ro", "nosuid", "nodev", "noexec")

T = TypeVar("T")


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
        open_files=_limit(resource.RLIMIT_NOFILE),
        file_bytes=_limit(resource.RLIMIT_FSIZE),
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


def _limit(number: int) -> int | None:
    highest = resource.getrlimit(number)[1]
    return None if highest == resource.RLIM_INFINITY else highest


def _interfaces() -> tuple[str, ...]:
    with open("/proc/net/dev") as lines:
        return tuple(line.partition(":")[0].strip() for line in lines if ":" in line)


def _kernel() -> str:
    with open("/proc/version") as version:
        return version.read().partition(" (")[0].strip()
