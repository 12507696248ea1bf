"""Folders that belong to the user of sandboxes, handled by a server that is another user.

Root needs nothing for that. A server with the capabilities SETUID and SETGID does it with the rights of that user, so
that nothing in there can lead it to more. That user does not get through the folders above, which are the server's;
so the way goes through a descriptor of the folder around. Programs of this machine copy, mount and make file systems.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable, StorageFull, WorkspaceUnavailable
from agent_sdk.workspace.users import fsuid
from workspaces.backend.contract import UID

PATH = f"{os.defpath}:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin"
"""Ours, not the server's: those who start it need not have the folders of the administrator in theirs."""
# What is equal on the disk stays shared where the file system can do that, and holes stay holes.
COPY = ("cp", "--reflink=auto", "--sparse=always")
FULL = ("no space left on device", "disk quota exceeded")
SERVERS = 0o711
"""Of a folder of the server in which theirs are: they may pass, and see nothing else."""


def make(folder: Path) -> None:
    """Make an empty one; where the server cannot give it away everybody may write to it. Blocks."""
    folder.mkdir(mode=0o700)
    try:
        os.chown(folder, UID, UID)
    except PermissionError:
        folder.chmod(0o777)  # what it is in can be entered by this user alone


def make_within(folder: Path, count: int) -> list[Path]:
    """Make so many empty folders in one of theirs, in which everybody may write. Blocks."""
    wanted = [folder / str(number) for number in range(count)]
    try:
        with _reached(folder) as (_, there), fsuid(UID):
            for place in wanted:
                _make_open(f"{there}/{place.name}")
    except PermissionError:
        for place in wanted:
            _make_open(str(place))
    return wanted


def open_to_all(folder: Path) -> None:
    """Let everybody make files in one. Blocks."""
    try:
        with _reached(folder) as (_, there), fsuid(UID):
            os.chmod(there, 0o1777)
    except PermissionError:
        folder.chmod(0o1777)


def _make_open(place: str) -> None:
    os.makedirs(place, exist_ok=True)
    os.chmod(place, 0o1777)


def remove(folder: Path) -> None:
    """Remove one, as far as this server may. Blocks."""
    if os.geteuid() == 0:
        remove_as(folder, None)
        return
    with _reached(folder) as (_, there):
        try:
            remove_as(Path(there), UID)
        except PermissionError:
            remove_as(folder, None)


def remove_as(folder: Path, user: int | None) -> None:
    """Remove a folder with the rights of a user, as far as it can be done; None: with those of the server. Blocks."""
    with fsuid(user):
        with suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
        _remove_stubborn(folder)
    with suppress(OSError):  # what it stands in is the server's
        folder.rmdir()


def _remove_stubborn(folder: Path) -> None:
    """Empty a folder whose folders nobody may write, or are nested deeper than anybody can walk."""
    here = _entries(folder)
    while here:
        for entry in here:
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry)
                    continue
                for below in _entries(Path(entry)):
                    if below.is_dir(follow_symlinks=False):
                        os.chmod(below, 0o700)
                        os.rename(below, folder / new_id())
                    else:
                        os.unlink(below)
                os.rmdir(entry)
        before, here = here, _entries(folder)
        if [entry.name for entry in here] == [entry.name for entry in before]:
            return


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with suppress(OSError):
        folder.chmod(0o700)
        return list(os.scandir(folder))
    return []


def copy(source: Path, target: Path) -> None:
    """Copy all that is in one into another, which is empty; no link is followed. Blocks.

    Raises:
        IsolationUnavailable: this server may not read what is in there.
        StorageFull, WorkspaceUnavailable: there is no room, or it cannot be copied.
    """
    if os.geteuid() == 0:
        run("snapshot", *COPY, "-a", "--", f"{source}/.", str(target))
        return
    with _reached(source) as (around, there), _reached(target) as (beside, here):
        try:
            run("snapshot", *COPY, "-a", "--", f"{there}/.", here, user=UID, keep=(around, beside))
        except PermissionError:
            raise IsolationUnavailable(
                "this server may not read what commands in sandboxes have written; let it be root, or give it "
                "the capabilities SETUID and SETGID",
                wanted="snapshot",
            ) from None


def size(folder: Path) -> int:
    """Return the bytes that one occupies; nothing is followed out of it. Blocks."""
    with _reached(folder) as (_, there), fsuid(None if os.geteuid() == 0 else UID):
        return sum(path.lstat().st_blocks * 512 for path in Path(there).rglob("*"))


@contextmanager
def _reached(folder: Path) -> Iterator[tuple[int, str]]:
    """A way to a folder for whoever may not go the whole way, and the descriptor that it needs."""
    around = os.open(folder.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield around, f"/proc/self/fd/{around}/{folder.name}"
    finally:
        os.close(around)


def run(phase: str, *command: str, user: int | None = None, keep: tuple[int, ...] = ()) -> None:
    """Run a program to its end. Blocks.

    Args:
        phase: of the start, snapshot, … that it is for.
        command: a program and its arguments.
        user: as whom, and with the group of the same number; None: as this process.
        keep: descriptors that it inherits.

    Raises:
        PermissionError: this process may not become that user.
        StorageFull: it found no space.
        WorkspaceUnavailable: it is missing or failed; the sentence has what it said first. Details: phase.
    """
    program = shutil.which(command[0], path=PATH)
    if program is None:
        raise WorkspaceUnavailable(f"{command[0]} is not installed on the server's machine", phase=phase)
    ended = subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": PATH, "LC_ALL": "C"},
        user=user,
        group=user,
        extra_groups=None if user is None else (),
        pass_fds=keep,
        check=False,
    )
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").split("\n")
        words = next((line.strip() for line in said if line.strip()), f"it ended with {ended.returncode}")
        if any(full in words.lower() for full in FULL):
            raise StorageFull(f"the disk of the server is full: {words}", path="")
        raise WorkspaceUnavailable(f"{command[0]} failed: {words}", phase=phase)
