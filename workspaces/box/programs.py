"""Programs of this machine that a server runs for itself: mounting, making file systems, copying."""

from __future__ import annotations

import os
import shutil
import subprocess

from agent_sdk.protocol.errors import StorageFull, WorkspaceUnavailable

PATH = f"{os.defpath}:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin"
"""Ours, not the server's: those who start it need not have the folders of the administrator in theirs."""
# What is equal on the disk stays shared where the file system can do that, and holes stay holes.
COPY = ("cp", "--reflink=auto", "--sparse=always")
FULL = ("no space left on device", "disk quota exceeded")


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
