"""What the engine calls the folders of this process, when this process runs in a container of that engine.

The engine mounts folders of its own machine. A server that is in a container itself sees those folders elsewhere, and
only those that are mounted into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from agent_sdk.protocol.errors import WorkspaceUnavailable
from workspaces.backend.docker.engine import Engine
from workspaces.backend.docker.reach import LOOPBACK, SELF, engine_address, own_container


class HostPaths:
    """From paths of this process to those of the engine."""

    def __init__(self, mounts: Mapping[Path, Path] | None = None, unseen: str = "") -> None:
        """Take the folders of the engine by where they are mounted here; None: both see the same."""
        self._mounts = mounts
        self.unseen = unseen
        """Why the engine does not see what is mounted here; empty: it does."""

    @classmethod
    async def find(cls, engine: Engine, *, process: Path = SELF) -> Self:
        """Find out whether this process runs in a container that this engine knows, or on another machine than it.

        Raises:
            EngineUnavailable: the engine does not answer.
        """
        container = await own_container(engine, process)
        if container is None:
            here = await engine_address(engine) == LOOPBACK
            return cls(None, "" if here else f"the engine at {engine.where} is on another machine")
        mounts = container.get("Mounts") or ()
        return cls(
            {Path(mount["Destination"]): Path(mount["Source"]) for mount in mounts if mount.get("Source")},
            "the server runs in a container, and its engine does not see what is mounted there",
        )

    def __repr__(self) -> str:
        return f"<HostPaths {'the same' if self._mounts is None else dict(self._mounts)}>"

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
