"""Copies of the workspaces of sandboxes, from which new ones may begin.

Each has a folder named after its id: `disk.img` is the copy of a disk, `files` that of a plain folder. They stay until
somebody removes that folder; a workspace that began with one shares nothing with it that matters.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable, NotFound
from agent_sdk.protocol.methods.workspace import SnapshotTaken
from agent_sdk.workspace.disk import in_thread
from workspaces.box import sandbox_files
from workspaces.box.disks import FRESH, Disks
from workspaces.box.sandbox_files import COPY, SERVERS, run

DISK, FILES = "disk.img", "files"


class Snapshots:
    """The snapshots in one folder, taken of the workspaces of these disks."""

    def __init__(self, folder: Path, disks: Disks) -> None:
        self._folder = folder
        self._disks = disks

    def __repr__(self) -> str:
        return f"<Snapshots {self._folder}>"

    async def take(self, owner: str) -> SnapshotTaken:
        """Copy the workspace of an owner. Nothing may write into it meanwhile: a box that runs has to be frozen.

        Cancelling waits for the copy and removes it.

        Raises:
            NotFound: the owner has no workspace.
            StorageFull: there is no room for a copy.
            WorkspaceUnavailable: it cannot be read; details: phase.
        """
        if not self._disks.has(owner):
            raise NotFound("there is no workspace to take a snapshot of; run something in it first")
        id = new_id()
        fresh = self._folder / f"{id}{FRESH}"
        await in_thread(_make, fresh)
        try:
            async with self._disks.at_hand(owner) as files:
                if self._disks.image(owner).exists():
                    await in_thread(run, "snapshot", "sync", "--file-system", str(files))
                    await in_thread(run, "snapshot", *COPY, str(self._disks.image(owner)), str(fresh / DISK))
                else:
                    await in_thread(sandbox_files.make, fresh / FILES)
                    await in_thread(sandbox_files.copy, files, fresh / FILES)
            size = await in_thread(_size, fresh)
            await in_thread(fresh.rename, self._folder / id)
        finally:
            await in_thread(_remove, fresh)
        return SnapshotTaken(id=id, size=size)

    def check(self, id: str, size: int | None = None) -> Path:
        """Return the place of a snapshot from which a workspace of this size could be made. Blocks.

        Args:
            id: of the snapshot.
            size: bytes that were asked for; a disk has the size it had.

        Raises:
            InvalidParams: there is no such snapshot, or it has another size.
            IsolationUnavailable: it is a disk, and this server cannot mount disks now.
        """
        place = self._folder / id
        if not re.fullmatch(r"[0-9a-zA-Z-]{1,64}", id) or not place.is_dir():
            raise InvalidParams("sandbox.snapshot: there is no snapshot of this id on this server")
        has = (place / DISK).stat().st_size if (place / DISK).exists() else None
        if size not in (None, has):
            limit = "no limit" if has is None else f"{has >> 20}m"
            raise InvalidParams(f"sandbox.disk: the snapshot has {limit}; leave disk out")
        if has is not None and self._disks.mechanism == "none":
            raise IsolationUnavailable(
                f"sandbox.snapshot: it is a disk, and this server cannot mount one: {self._disks.why}",
                wanted="disk",
            )
        return place

    async def lay_out(self, id: str, owner: str, size: int | None = None) -> None:
        """Make the workspace of an owner who has none from a snapshot; nothing happens to one that is there.

        Raises:
            InvalidParams, IsolationUnavailable: there is no such snapshot, or it cannot be used here.
            StorageFull: there is no room for a copy.
        """
        if self._disks.has(owner):
            return
        place = await in_thread(self.check, id, size)
        await self._disks.copy(owner, place / (DISK if (place / DISK).exists() else FILES))


def _make(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(SERVERS)


def _size(snapshot: Path) -> int:
    """Bytes that it occupies."""
    disk = snapshot / DISK
    return disk.stat().st_blocks * 512 if disk.exists() else sandbox_files.size(snapshot / FILES)


def _remove(snapshot: Path) -> None:
    if (snapshot / FILES).exists():
        sandbox_files.remove(snapshot / FILES)
    shutil.rmtree(snapshot, ignore_errors=True)
