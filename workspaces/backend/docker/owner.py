"""Which process of this machine something belongs to, and whether it still lives."""

from __future__ import annotations

import os
from pathlib import Path

from agent_sdk.workspace.process_tree import started_ticks

UNKNOWN = "unknown"
"""A machine whose processes cannot be told from others'."""


def this_process() -> str:
    """Return a name of this process that no other one ever has."""
    return f"{_machine()}.{os.getpid()}.{started_ticks(os.getpid()) or 0}"


def is_dead(owner: str) -> bool:
    """Whether the process of this name has ended; False also for those of other machines and containers."""
    machine, _, process = owner.partition(".")
    pid, _, ticks = process.partition(".")
    if machine in ("", UNKNOWN) or machine != _machine() or not (pid.isdecimal() and ticks.isdecimal()):
        return False
    return started_ticks(int(pid)) != int(ticks)


def _machine() -> str:
    """The run of the kernel, and the process ids that are meant: containers count their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').readlink().name.strip('pid:[]')}"
    except OSError:
        return UNKNOWN
