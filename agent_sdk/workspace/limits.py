"""The limits of the container a box is alone in: noticed when something ran into one.

The kernel counts what it killed for want of memory and which processes it did not start; nothing tells of it.
So the counters are looked at whenever a command or a call has ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple

from agent_sdk.protocol.methods.workspace import LimitReached
from agent_sdk.workspace.cgroup import Cgroup

FULL_BYTES = 1 << 20
"""A disk with less room than this, and than an eighth of it, is full: programs write in large pieces."""

_DIES_FIRST = b"1000"

Limit = Literal["memory", "pids", "disk"]
_LIMITS: tuple[Limit, ...] = ("memory", "pids", "disk")


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
