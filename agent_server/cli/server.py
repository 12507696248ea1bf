"""A server and what belongs to it: serve, health, config, backup.

What only `serve` needs is imported when it runs: health checks come often.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct

from agent_sdk.log.database import Database
from agent_sdk.protocol.errors import (
    ConnectionLost,
    InvalidParams,
    PathExists,
    PathNotFound,
    WorkspaceUnavailable,
)
from agent_sdk.remote.connection import LONGEST_BODY, nowhere, refused, unreachable
from agent_sdk.workspace.disk import in_thread
from agent_server.cli.client import checked_address
from agent_server.cli.terminal import STDERR, Row, one_line, open_terminal, print_json
from agent_server.config.options import Setting, client_environment, load_given, settings
from agent_server.data_folder import LOG_FILE, DataFolder, address_in
from agent_server.keys import KEY_FILE
from workspaces.backend.contract import Ready
from workspaces.backend.sandbox_files import COPY, PATH

ANSWER_SECONDS = 4.0
"""Less than what health checks wait by default."""
KEPT = (KEY_FILE, "workspaces", "disks", "snapshots")
"""Beside the log. The rest belongs to boxes and runtimes, which a copy does not have, or is made anew."""
VANISHED = b": No such file or directory"


class _Health(Struct):
    status: str
    degraded: list[str] = []


async def health(given: argparse.Namespace) -> int:
    """Say how it is; 0 when it answers, also when it is degraded: what a new start would not mend."""
    named = given.url or (None if given.data or given.config else client_environment().url)
    url = checked_address(named) if named else _own(given)
    health = await ask(url)
    rest = f": {', '.join(health.degraded)}" if health.degraded else ""
    await open_terminal().line(one_line(f"{health.status}{rest} ({url})"), "yellow" if rest else "green")
    return 0


async def ask(url: str) -> _Health:
    """Ask the server at a URL how it is.

    Raises:
        ConnectionLost: nobody answers there within 4 s, or the URL is not that of an agent server.
    """
    try:
        # A proxy would be asked about its own view of the network; redirects lead to somebody else.
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session,
            session.get(f"{url}/health", allow_redirects=False) as answer,
        ):
            body = await answer.read()
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise unreachable(url, exc, direct=True) from None
    ours = answer.headers.get("Server") == "agent-server"
    try:
        if ours and answer.status == 200:
            return msgspec.json.decode(body, type=_Health)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    if ours and answer.status in (401, 404):  # the right address asks for no key
        raise ConnectionLost(nowhere(url))
    raise refused(url, answer.status, answer.headers, body[:LONGEST_BODY], api_key=None)


def _own(given: argparse.Namespace) -> str:
    """Return where the server of a data folder listens."""
    config = load_given(given)
    address = address_in(config.folder)
    if address is None:
        raise PathNotFound(
            f"no server runs with the data folder {config.data}; name it with --data, "
            "or its address with --url or AGENT_SERVER_URL",
            path=config.data,
        )
    return address


async def serve(given: argparse.Namespace) -> int:
    """Run a server; when it accepts connections, standard output tells where it is. The log goes to standard error."""
    from agent_server import serve as server  # noqa: PLC0415

    config = load_given(given)

    def announce(ready: Ready) -> None:
        if given.json:
            sys.stdout.write(msgspec.json.encode(ready).decode() + "\n")
        else:
            key = ready.api_key_file or "the configuration"
            sys.stdout.write(f"The agent server is ready at {ready.url}\nIts API key is in {key}\n")
        sys.stdout.flush()

    await server.serve(config, on_ready=announce)
    return 0


async def show_options(given: argparse.Namespace) -> int:
    """Show every option of a server, its value and where it was set; no secrets. Nothing is started.

    A table, or one JSON object per line.
    """
    config = load_given(given)
    found = settings(config)
    if given.json:
        await print_json(found)
        return 0
    rows: list[Row] = [(_cells(setting), "dim" if setting.source == "default" else "") for setting in found]
    await open_terminal().table(("OPTION", "VALUE", "SOURCE"), rows)
    warnings = open_terminal(STDERR)
    for sentence in config.unknown:
        await warnings.line(f"agent-server: {one_line(sentence)}", "yellow")
    return 0


def _cells(setting: Setting) -> tuple[str, str, str]:
    value = setting.value if isinstance(setting.value, str) else msgspec.json.encode(setting.value).decode()
    return setting.option, one_line(value) or '""', setting.source


async def back_up(given: argparse.Namespace) -> int:
    """Make a copy of a data folder, whole or not at all, also while a server works on it; says what is in it."""
    config = load_given(given)
    conversations = await backup(DataFolder(config.folder), Path(given.destination))
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
    """Copy it in one go: what is written meanwhile neither waits nor begins it anew. Blocks."""
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
