"""What is written down so that a later process finds it: which process something is, or belongs to; small files.

Files are written whole or not at all, whatever happens meanwhile, and read where they make sense.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from agent_sdk.ids import new_id
from agent_sdk.workspace.process_tree import started_ticks

R = TypeVar("R", bound=Struct)
LAST_LINES = 20
LAST_BYTES = 64 << 10
UNKNOWN = "unknown"
"""A machine whose processes cannot be told from others'."""


class Identity(Struct, frozen=True):
    """Which process it is, on this machine and for ever."""

    boot: str
    """Of the machine: after another one nothing of it can be left."""
    pid: int
    ticks: int
    """When it started, as the kernel counts: tells it from a later process of the same number."""


def read_record(file: Path, kind: type[R]) -> R | None:
    """Return what was written to a file; None: nothing, or something else. Blocks."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def write_record(file: Path, record: Struct) -> None:
    """Write it in the place of what is there. Blocks."""
    _write(file, msgspec.json.encode(record))


def instance_of(file: Path) -> str:
    """Return the id that a file keeps, made with the first look. Blocks."""
    with suppress(FileNotFoundError):
        return file.read_text(encoding="ascii").strip()
    _write(file, f"{new_id()}\n".encode())
    return file.read_text(encoding="ascii").strip()


def last_lines(log: Path) -> list[str]:
    """Return the end of a log, at most 20 lines. Blocks."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    return []


def boot_id() -> str:
    """Name what the machine's kernel has been through since it was started; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


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
    boot = boot_id()
    try:
        return f"{boot}-{Path('/proc/self/ns/pid').readlink().name.strip('pid:[]')}" if boot else UNKNOWN
    except OSError:
        return UNKNOWN


def _write(file: Path, content: bytes) -> None:
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_bytes(content)
    fresh.replace(file)
