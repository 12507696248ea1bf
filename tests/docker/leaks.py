"""What is left of somebody who died: containers, networks, volumes, mounts and processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.docker.networks import networks
from workspaces.backend.docker.engine import Engine

SECONDS = 30
"""So soon after a death nothing is left that nobody owns."""


async def left_of(engine: Engine, by_label: Mapping[str, str], *marks: str) -> set[str]:
    """All that has these labels on the engine, and what bears one of the marks on this machine.

    A mark is a folder or a name: of mounts it is in the place, of processes in the command or the environment.
    """
    left = {f"container {one['Names'][0]} {one['State']}" for one in await engine.containers(by_label)}
    left |= {f"network {one['Name']}" for one in await networks(by_label)}
    left |= {f"volume {one['Name']}" for one in await engine.volumes(by_label)}
    return left | await asyncio.to_thread(marked, [mark.encode() for mark in marks])


def marked(marks: list[bytes]) -> set[str]:
    left = {
        f"mount {line}" for line in Path("/proc/self/mounts").read_bytes().splitlines() if _bears(line, marks)
    }
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if _bears(command, marks) or _bears((process / "environ").read_bytes(), marks):
                left.add(f"process {process.name} {command.decode(errors='replace')[:200]}")
    return left


async def nothing_is_left_of(
    engine: Engine, by_label: Mapping[str, str], *marks: str, but: set[str] | None = None
) -> None:
    """Return as soon as nothing is left but what has an owner.

    Raises:
        AssertionError: something still is after 30 s.
    """
    left = {"everything"}
    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS):
            while left := await left_of(engine, by_label, *marks):  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # nobody tells of mounts and of processes of others
    assert not left, f"left after {SECONDS} s: {sorted(left)}"


def _bears(text: bytes, marks: list[bytes]) -> bool:
    return any(mark in text for mark in marks)
