"""What the engine calls the folders of this process, when this process runs in a container of that engine.

The engine mounts folders of its own machine. A server that is in a container itself sees those folders elsewhere, and
only those that are mounted into it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from agent_sdk.disk import in_thread
from agent_sdk.protocol.errors import NotFound, WorkspaceUnavailable
from workspaces.engine import Engine

# Engines mount these files into each container, from a folder that has the name of the container.
OWN_FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
ID = r"[0-9a-f]{64}"


class HostPaths:
    """From paths of this process to those of the engine."""

    def __init__(self, mounts: Mapping[Path, Path] | None = None) -> None:
        """Take the folders of the engine by where they are mounted here; None: both see the same."""
        self._mounts = mounts

    @classmethod
    async def find(cls, engine: Engine, *, process: Path = Path("/proc/self")) -> Self:
        """Find out whether this process runs in a container that this engine knows.

        Raises:
            EngineUnavailable: the engine does not answer.
        """
        for name in await in_thread(_candidates, process):
            try:
                container = await engine.inspect(name)
            except NotFound:  # of another engine, or no id at all
                continue
            mounts = container.get("Mounts") or ()
            return cls({Path(m["Destination"]): Path(m["Source"]) for m in mounts if m.get("Source")})
        return cls()

    def __repr__(self) -> str:
        return f"<HostPaths {'the same' if self._mounts is None else dict(self._mounts)}>"

    @property
    def inside(self) -> bool:
        """Whether this process runs in a container, so that the engine does not see what is mounted here."""
        return self._mounts is not None

    def of(self, path: Path) -> str:
        """Return what the engine calls a folder.

        Raises:
            WorkspaceUnavailable: the engine cannot reach it, because it is not mounted into this container.
        """
        if self._mounts is None:
            return str(path)
        for place in (path, *path.parents):
            if place in self._mounts:
                return str(self._mounts[place] / path.relative_to(place))
        raise WorkspaceUnavailable(
            f"the server runs in a container, and {path} is not on a volume that sandboxes could mount, too; "
            "mount a volume or a folder there (docker run --volume agent-data:/data)",
            phase="create",
        )


def _candidates(process: Path) -> list[str]:
    """What the container of a process may be called, surest first. Blocks."""
    found = []
    for line in _lines(process / "mountinfo"):
        fields = line.split(" ")
        if len(fields) > 4 and fields[4] in OWN_FILES:
            found += re.findall(rf"containers/({ID})/", fields[3])
    for line in _lines(process / "cgroup"):
        found += re.findall(rf"[/-]({ID})(?:\.scope)?$", line)
    if re.fullmatch(r"[0-9a-f]{12}", host := socket.gethostname()):
        found.append(host)
    return list(dict.fromkeys(found))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:  # there is no /proc here
        return []
