"""Percentiles, memory of a process, and rows of the table."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec import Struct


class Row(Struct, frozen=True, kw_only=True):
    """One measured number, the limit measured beside it, and the target where one is set."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    """What the machine itself does in the same run."""
    limit_name: str = ""
    target: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Value over limit."""
        return self.value / self.limit if self.limit else None


def percentile(values: list[float], share: float) -> float:
    """Return the value below which this share of the sample lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def times(count: int, action: Callable[[], Awaitable[object]]) -> list[float]:
    """Return how many seconds each of `count` runs took, after three that do not count."""
    for _ in range(3):
        await action()
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await action()
        taken.append(time.perf_counter() - began)
    return taken


def rss_mib(pid: int | None = None) -> float:
    """Return the resident memory of a process in MiB."""
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def peak_mib(pid: int | None = None) -> float:
    """Return the highest resident memory of a process so far, in MiB."""
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def forget_peak(pid: int | None = None) -> None:
    """Let the peak start anew from the present memory."""
    Path(f"/proc/{pid or os.getpid()}/clear_refs").write_text("5")


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found
