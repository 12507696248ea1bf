"""The container that this process runs in, where an engine can tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_sdk.protocol.errors import NotFound

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine

SELF = Path("/proc/self")
_MOUNTED = re.compile(r"containers/([0-9a-f]{64})/\S+ /etc/(?:hostname|hosts|resolv\.conf) ")
"""Engines mount these three into every container, from a folder named after it."""


async def own_container(engine: Engine, process: Path = SELF) -> dict[str, Any] | None:
    """Return what the engine says of the container that this process runs in; None: it runs in none of this engine.

    Args:
        engine: the one that is asked.
        process: the folder of another process in /proc instead.

    Raises:
        EngineUnavailable: it does not answer.
    """
    found = own_container_id(process)
    try:
        return None if found is None else await engine.inspect(found)
    except NotFound:
        return None


def own_container_id(process: Path = SELF) -> str | None:
    """Return the id of the container that this process runs in, as its mounts tell it. Reads one small file."""
    try:
        found = _MOUNTED.search((process / "mountinfo").read_text())
    except OSError:
        return None
    return found[1] if found else None
