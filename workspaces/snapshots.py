"""Copies of the workspaces of sandboxes, from which new ones may begin.

Each has a folder named after its id: `disk.img` is the copy of a disk, `files` that of a plain folder. They stay until
somebody removes that folder; a workspace that began with one shares nothing with it that matters.
"""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

from agent_sdk.disk import in_thread
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable, NotFound
from agent_sdk.protocol.methods import SnapshotTaken
from workspaces.disks import FRESH, Disks
from workspaces.programs import run

DISK, FILES = "disk.img", "files"
# What is equal on the disk stays shared where the file system can do that, and holes stay holes.
COPY = ("cp", "--reflink=auto", "--sparse=always")


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
                    await in_thread(run, "snapshot", *COPY, "-a", "--", str(files), str(fresh / FILES))
            size = await in_thread(_size, fresh)
            await in_thread(fresh.rename, self._folder / id)
        finally:
            await in_thread(shutil.rmtree, fresh, True)
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
            InvalidParams, IsolationUnavailable: see `check`.
            StorageFull: there is no room for a copy.
        """
        if self._disks.has(owner):
            return
        place = await in_thread(self.check, id, size)
        if (disk := place / DISK).exists():
            await self._disks.adopt(owner, partial(run, "snapshot", *COPY, "--", str(disk)), is_disk=True)
        else:
            files = str(place / FILES)
            await self._disks.adopt(owner, partial(run, "snapshot", *COPY, "-a", "--", files), is_disk=False)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)


def _size(folder: Path) -> int:
    """Bytes that it occupies; nothing is followed out of it."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
