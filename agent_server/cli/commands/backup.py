"""agent-server backup: a copy of a data folder from which a server can be started, also while one works on it."""

from __future__ import annotations

import argparse
import asyncio
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from agent_sdk.log.database import Database
from agent_sdk.protocol.errors import InvalidParams, PathExists, PathNotFound, WorkspaceUnavailable
from agent_sdk.workspace.disk import in_thread
from agent_server.cli.terminal import open_terminal
from agent_server.config.options import load_given
from agent_server.data_folder import LOG_FILE, DataFolder
from agent_server.keys import KEY_FILE
from workspaces.box.sandbox_files import COPY, PATH

KEPT = (KEY_FILE, "workspaces", "disks", "snapshots")
"""Beside the log. The rest belongs to boxes and runtimes, which a copy does not have, or is made anew."""
VANISHED = b": No such file or directory"


async def main(given: argparse.Namespace) -> int:
    """Make it, whole or not at all; says what is in it."""
    config = load_given(given)
    conversations = await backup(DataFolder(Path(config.data)), Path(given.destination))
    await open_terminal().line(f"{conversations} conversations of {config.data} are in {given.destination}")
    return 0


async def backup(folder: DataFolder, destination: Path) -> int:
    """Copy the log as it is at one moment, then the files; return how many conversations it has.

    Files that commands write meanwhile may be newer than the log. What fails or is cancelled leaves nothing.

    Raises:
        PathNotFound: there is no log in the folder.
        PathExists: the destination is there.
        InvalidParams: it lies in the folder.
        StorageFull, PathDenied, PathError, WorkspaceUnavailable: it cannot be written, or something not be read.
    """
    _make(folder, destination)
    try:
        conversations = await in_thread(_copy_log, folder.log, destination / LOG_FILE)
        for name in await in_thread(lambda: [file for file in KEPT if (folder.root / file).exists()]):
            await _copy(folder.root / name, destination / name)
    except BaseException:
        await in_thread(shutil.rmtree, destination, True)
        raise
    return conversations


def _make(folder: DataFolder, destination: Path) -> None:
    if not folder.log.is_file():
        raise PathNotFound(f"{folder.root}: there is no {LOG_FILE} to back up", path=str(folder.log))
    if destination.resolve().is_relative_to(folder.root.resolve()):
        raise InvalidParams(f"{destination} lies in the data folder; choose a place outside of it")
    try:
        destination.mkdir(mode=0o700)
    except FileExistsError:
        raise PathExists(
            f"{destination} exists; name a folder that does not", path=str(destination)
        ) from None


def _copy_log(log: Path, copy: Path) -> int:
    """All of it is read in one go: what is written meanwhile neither waits nor begins it anew. Blocks."""
    source = Database(log, read_only=True)
    target = Database(copy)
    try:
        with target.translated(), target.connection.backup("main", source.connection, "main") as running:
            running.step(-1)
        return int(target.value("SELECT count(*) FROM conversations"))
    finally:
        target.close()
        source.close()


async def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder with owners, times and holes; what vanishes meanwhile is left out."""
    process = await asyncio.create_subprocess_exec(
        *COPY, "-a", "--", str(source), str(target),
        stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, env={"PATH": PATH, "LC_ALL": "C"},
    )  # fmt: skip
    try:
        _, said = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    problems = [line for line in said.splitlines() if not line.endswith(VANISHED)]
    if process.returncode and problems:
        words = problems[0].decode(errors="replace")
        raise WorkspaceUnavailable(f"{source} cannot be copied: {words}", phase="backup")
