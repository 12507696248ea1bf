"""The workspaces of sandboxes, and copies: a disk of limited size each where this machine can make one, or a folder.

A disk is a sparse file with an ext4 file system in it. It is mounted here only while the container that uses it
starts: from then on the container has a mount of its own, which goes when it goes. So whoever is killed, nothing
stays mounted; and a disk takes another name like any file, also while a container uses it. A disk that was not
unmounted cleanly needs no check: mounting it replays its journal.

A snapshot is a copy of a workspace from which new ones may begin. Each has a folder named after its id: `disk.img` is
the copy of a disk, `files` that of a plain folder. They stay until somebody removes that folder; a workspace that began
with one shares nothing with it that matters.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    IsolationUnavailable,
    NotFound,
    StorageFull,
)
from agent_sdk.protocol.methods.workspace import SnapshotTaken
from agent_sdk.workspace.disk import in_thread
from workspaces.backend import sandbox_files
from workspaces.backend.contract import UID
from workspaces.backend.sandbox_files import COPY, SERVERS, run

Mechanism = Literal["ext4-loop", "none"]

LEAST_BYTES = 16 << 20
"""A smaller file system would be all journal."""
BYTES_PER_INODE = 8192
"""Half of what is usual: sources and packages are many small files."""
MOUNT_OPTIONS = "loop,nosuid,nodev,noatime,discard,noinit_itable,errors=remount-ro"
"""`discard` gives back what was removed; `noinit_itable`: the kernel writes nothing by itself, so that a disk whose
box is frozen can be copied."""
FRESH = ".fresh"
"""Ends the name of what is not whole yet."""
DISK, FILES = "disk.img", "files"
"""Of a snapshot, whatever its workspace was."""


class Disks:
    """The workspaces below one folder. Until `prepare` has found out more they can have no limit."""

    def __init__(self, folder: Path, *, quota: bool = True) -> None:
        """Describe them.

        Args:
            folder: where `disks`, `mounts` and `workspaces` are; nobody else mounts anything below it.
            quota: False: plain folders even where disks would work.
        """
        self.mechanism: Mechanism = "none"
        self.why = "it is switched off"
        """Why there is no limit; empty when there is."""
        self._disks = folder / "disks"
        self._mounts = folder / "mounts"
        self._folders = folder / "workspaces"
        self._quota = quota
        self._turns: dict[str, asyncio.Lock] = {}
        """Per owner: a disk that is mounted by two at the same moment may be attached twice, and damaged by that."""

    def __repr__(self) -> str:
        return f"<Disks {self._disks.parent}: {self.mechanism}>"

    async def prepare(self, *, unseen: str = "") -> None:
        """Find out whether there can be limits, and unmount what somebody who was killed has left.

        Args:
            unseen: why the engine does not see what is mounted here; empty: it does.
        """
        await in_thread(self._make_folders)
        for place in self._mounts.iterdir():  # containers keep what they have mounted
            await in_thread(_unmount, str(place))
        if self._quota:
            self.why = unseen or await self._probe()
            self.mechanism = "none" if self.why else "ext4-loop"

    async def keep(self, wanted: Callable[[str], bool]) -> None:
        """Remove the workspaces of all owners but those that are wanted."""
        for owner in await in_thread(self.owners):
            if not wanted(owner):
                await self.remove(owner)

    def owners(self) -> set[str]:
        """Return all who have a workspace. Blocks."""
        owners = {image.stem for image in self._disks.glob("*.img")}
        return owners | {folder.name for folder in self._folders.iterdir()}

    def check(self, size: int | None, field: str = "sandbox.disk") -> None:
        """Check whether a workspace could have this limit; None: it needs none.

        Raises:
            IsolationUnavailable: there is no way to limit it here.
            InvalidParams: the size is too small, or more than the disk of the server has.
        """
        if size is not None and self.mechanism == "none":
            raise IsolationUnavailable(
                f"{field}: this server cannot limit a workspace: {self.why}; leave {field[8:]} out",
                wanted="disk",
            )
        if size is not None and size < LEAST_BYTES:
            raise InvalidParams(f"{field}: at least {LEAST_BYTES >> 20}m are needed")
        if size is not None and size > (most := shutil.disk_usage(self._disks).total):
            raise InvalidParams(f"{field}: the disk of the server has {most >> 30}g in all")

    async def make(self, owner: str, size: int) -> None:
        """Make an empty workspace for an owner who has none; nothing happens to one that is there.

        Args:
            owner: whose it is; the name of a file.
            size: bytes it may hold, where there can be limits.

        Raises:
            StorageFull: the server's disk is full.
        """
        async with self._turn(owner):
            if not self.has(owner):
                await self._make(owner, size)

    async def copy(self, owner: str, source: Path) -> None:
        """Make the workspace of an owner who has none from a disk, or from a folder.

        Raises:
            IsolationUnavailable, StorageFull, WorkspaceUnavailable: it cannot be copied.
        """
        async with self._turn(owner):
            place = self.image(owner) if await in_thread(source.is_file) else self.folder(owner)
            fresh = place.with_suffix(FRESH)
            try:
                await in_thread(_copy, source, fresh)
                await in_thread(fresh.rename, place)
            finally:
                await in_thread(_remove, fresh)

    @asynccontextmanager
    async def at_hand(self, owner: str) -> AsyncIterator[Path]:
        """The folder of a workspace, for as long as the block runs: what a container mounts during its start.

        Raises:
            WorkspaceUnavailable: it cannot be mounted.
        """
        async with self._turn(owner):
            if self.image(owner).exists():
                async with self._mounted(self.image(owner), self._mounts / owner) as mounted:
                    yield mounted
            else:
                yield self.folder(owner)

    def has(self, owner: str) -> bool:
        """Whether there is a workspace of this owner. Blocks for two system calls."""
        return self.image(owner).exists() or self.folder(owner).exists()

    def image(self, owner: str) -> Path:
        """Where the disk of an owner is, if it is a disk."""
        return self._disks / f"{owner}.img"

    def folder(self, owner: str) -> Path:
        """Where the workspace of an owner is, if it is a folder."""
        return self._folders / owner

    def used(self, owner: str) -> tuple[int, int] | None:
        """Bytes that a disk occupies and that it may; None: it has no limit. Blocks for one system call."""
        try:
            found = self.image(owner).stat()
        except OSError:
            return None
        return found.st_blocks * 512, found.st_size

    async def hand_over(self, owner: str, to: str) -> None:
        """Give a workspace to another owner, who has none yet, also while a container uses it."""
        for place in (self.image, self.folder):
            if place(owner).exists():
                await in_thread(place(owner).rename, place(to))
        self._turns.pop(owner, None)

    async def remove(self, owner: str) -> None:
        """Remove the workspace of an owner for good, if there is one. Nothing may use it any more.

        What this user may not remove stays, in a folder that only this user enters.
        """
        async with self._turn(owner):
            await in_thread(_remove, self.image(owner))
            await in_thread(_remove, self.folder(owner))
        self._turns.pop(owner, None)

    # --- what it is made of ---

    def _turn(self, owner: str) -> asyncio.Lock:
        return self._turns.setdefault(owner, asyncio.Lock())

    def _make_folders(self) -> None:
        for folder in (self._disks, self._mounts, self._folders):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(
                0o711
            )  # to remove what is theirs takes their rights; the folder around is the server's
        for fresh in (*self._disks.glob(f"*{FRESH}"), *self._folders.glob(f"*{FRESH}")):
            _remove(fresh)

    async def _make(self, owner: str, size: int) -> None:
        if self.mechanism == "none":
            await in_thread(sandbox_files.make, self.folder(owner))
            return
        fresh = self.image(owner).with_suffix(FRESH)
        try:
            await in_thread(_make_sparse, fresh, size)
            await in_thread(_format, fresh)
            await in_thread(fresh.rename, self.image(owner))
        except OSError as exc:
            raise StorageFull(f"the workspace cannot be made: {exc.strerror}", path="") from None
        finally:
            await in_thread(_remove, fresh)

    async def _probe(self) -> str:
        """Make a disk and mount it; returns why that does not work, or nothing."""
        probe = self._disks / f"probe{FRESH}"
        try:
            await in_thread(_make_sparse, probe, LEAST_BYTES)
            await in_thread(_format, probe)
            async with self._mounted(probe, self._mounts / "probe") as mounted:
                # A mount that says it worked and is of the same device is none.
                if mounted.stat().st_dev == self._mounts.stat().st_dev:
                    return "mounting a disk has no effect"
        except (AgentServerError, OSError) as exc:
            return str(exc)
        finally:
            await in_thread(_remove, probe)
        return ""

    @asynccontextmanager
    async def _mounted(self, image: Path, at: Path) -> AsyncIterator[Path]:
        try:
            # Nobody may write into the folder itself: when the mount is missing in a container, that is seen at once.
            await in_thread(at.mkdir, 0o000)
            await in_thread(run, "disk", "mount", "-t", "ext4", "-o", MOUNT_OPTIONS, str(image), str(at))
            with suppress(OSError):  # commands would trip over it, and nothing ever puts anything into it
                await in_thread((at / "lost+found").rmdir)
            yield at
        finally:
            await in_thread(_unmount, str(at))


def _unmount(place: str) -> None:
    """Unmount it if it is mounted, and remove the folder."""
    if os.path.ismount(place):
        run("disk", "umount", "--lazy", place)
    with suppress(FileNotFoundError):
        os.rmdir(place)


def _make_sparse(file: Path, size: int) -> None:
    with file.open("xb") as opened:
        os.fchmod(opened.fileno(), 0o600)
        opened.truncate(size)


def _format(image: Path) -> None:
    """Write an empty file system; what is not needed yet is not written, which makes it a matter of milliseconds."""
    extended = f"lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={UID}:{UID}"
    options = ("-q", "-F", "-m", "0", "-i", str(BYTES_PER_INODE), "-E", extended)
    run("disk", "mkfs.ext4", *options, str(image))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        sandbox_files.make(target)
        sandbox_files.copy(source, target)
    else:
        run("snapshot", *COPY, "--", str(source), str(target))


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        sandbox_files.remove(place)
    else:
        place.unlink(missing_ok=True)


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
        await in_thread(_make_folder, fresh)
        try:
            async with self._disks.at_hand(owner) as files:
                if self._disks.image(owner).exists():
                    await in_thread(run, "snapshot", "sync", "--file-system", str(files))
                    await in_thread(run, "snapshot", *COPY, str(self._disks.image(owner)), str(fresh / DISK))
                else:
                    await in_thread(sandbox_files.make, fresh / FILES)
                    await in_thread(sandbox_files.copy, files, fresh / FILES)
            size = await in_thread(_occupied, fresh)
            await in_thread(fresh.rename, self._folder / id)
        finally:
            await in_thread(_remove_snapshot, fresh)
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


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(SERVERS)


def _occupied(snapshot: Path) -> int:
    """Bytes that it occupies."""
    disk = snapshot / DISK
    return disk.stat().st_blocks * 512 if disk.exists() else sandbox_files.size(snapshot / FILES)


def _remove_snapshot(snapshot: Path) -> None:
    if (snapshot / FILES).exists():
        sandbox_files.remove(snapshot / FILES)
    shutil.rmtree(snapshot, ignore_errors=True)
