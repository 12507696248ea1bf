"""What is done in a workspace.

exec: a command; its bytes and its exit code are ours
cp:   a file or a folder into or out of it, or a file from or to a pipe, each verified
"""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

from agent_sdk import RemoteWorkspace
from agent_sdk.protocol.errors import InvalidParams, IsADirectory, PathNotFound
from agent_sdk.workspace.contract import ExecResult, OutputName, Transferred, Workspace
from agent_sdk.workspace.disk import in_thread
from agent_server.cli.client import entered
from agent_server.cli.terminal import STDERR, STDOUT, Inlet, Outlet, one_line, open_terminal

MARK = ":"
PIPE = "-"


async def copy(given: argparse.Namespace) -> int:
    """Copy it and say what was copied, but for what goes to standard output."""
    into = given.target.startswith(MARK)
    if given.source.startswith(MARK) == into:
        raise InvalidParams(
            "one of SRC and DST is a path in the workspace and starts with `:`, the other is a path of this machine, "
            "e.g. agent-server cp data.csv :in/data.csv"
        )
    async with entered(given) as workspace:
        told = await (_upload if into else _download)(workspace, given)
        if told and isinstance(workspace, RemoteWorkspace) and given.conversation is None:
            told += f", in the workspace of conversation {workspace.conversation}"
    if told:
        await open_terminal().line(one_line(told))
    return 0


async def _upload(workspace: Workspace, given: argparse.Namespace) -> str:
    source, path = given.source, given.target.removeprefix(MARK)
    if source == PIPE:
        if not PurePosixPath(path).name or path.endswith("/"):
            raise InvalidParams(
                "standard input has no name; name the file, e.g. agent-server cp - :in/data.csv"
            )
        return _told(given, f"{MARK}{path}", await workspace.write_stream(path, _typed()))
    folder = await in_thread(os.path.isdir, source)
    if path.endswith("/") and not folder or await _is_folder(workspace, path or "."):
        path = str(PurePosixPath(path, _name(source)))
    if folder:
        done = await workspace.upload_dir(source, path or ".", exclude=given.exclude)
    else:
        done = await workspace.upload(source, path)
    return _told(given, f"{MARK}{path}", done, folder=folder)


async def _download(workspace: Workspace, given: argparse.Namespace) -> str:
    path, target = given.source.removeprefix(MARK) or ".", Path(given.target)
    folder = await _is_folder(workspace, path)
    if given.target == PIPE:
        if folder:
            raise IsADirectory(f"{path} is a folder, which standard output does not take", path=path)
        async with workspace.read_stream(path) as stream:
            outlet = Outlet(STDOUT)
            async for data in stream:
                await outlet.write(data)
        return ""
    if await in_thread(target.is_dir):
        target = target / _name(path)
    if folder:
        done = await workspace.download_dir(target, path, exclude=given.exclude)
    else:
        done = await workspace.download(path, target)
    return _told(given, str(target), done, folder=folder)


async def _typed() -> AsyncIterator[bytes]:
    inlet = Inlet()
    while piece := await inlet.read():
        yield piece


async def _is_folder(workspace: Workspace, path: str) -> bool:
    try:
        found = await workspace.files.stat(path)
        if found.type == "symlink":
            found = await workspace.files.stat(f"{path}/.")
        return found.type == "dir"
    except (PathNotFound, NotADirectoryError):
        return False


def _name(source: str) -> str:
    """Return what it is called where it goes; nothing for `.` and `folder/.`: what is in a folder."""
    if source == "." or source.endswith("/."):
        return ""
    return os.path.basename(os.path.abspath(source))


def _told(given: argparse.Namespace, target: str, done: Transferred, *, folder: bool = False) -> str:
    what = "a folder, as an archive of " if folder else ""
    return f"{given.source} -> {target}: {what}{done.size} bytes, sha256 {done.sha256}"


async def execute(given: argparse.Namespace) -> int:
    """Run it; return its exit code, 128 + n when signal n ended it, 124 when its time was over."""
    command = _command(given)
    stdin = await Inlet().read_all() if given.stdin else None
    outlets = {"stdout": Outlet(STDOUT), "stderr": Outlet(STDERR)}

    async def pass_on(name: OutputName, data: bytes) -> None:
        await outlets[name].write(data)

    async with entered(given) as workspace:
        result = await workspace.execute(command, stdin=stdin, timeout=given.timeout, on_output=pass_on)
    code, sentence = verdict(result, given.timeout)
    if sentence:
        await outlets["stderr"].write(f"agent-server: {one_line(sentence)}\n".encode())
    return code


def verdict(result: ExecResult, timeout: float | None) -> tuple[int, str]:
    """Return the exit code, and what has to be said about it."""
    code = result.returncode
    if code is None:
        return 1, f"how the command ended is unknown: {result.reason or result.status}"
    match result.status:
        case "timeout":
            why = f" ({result.reason})" if result.reason else ""
            return code, f"the command was ended after {timeout} s{why}; --timeout gives it more time"
        case "spawn_failed":
            return code, f"the command did not start: {result.reason}"
    return code, result.reason


def _command(given: argparse.Namespace) -> str | list[str]:
    if given.text is not None and not given.program:
        return str(given.text)
    if given.program and given.text is None:
        return list(given.program)
    raise InvalidParams(
        "exec needs one command: a text for bash in quotes (agent-server exec 'ls | wc -l'), "
        "or a program after -- (agent-server exec -- ls -l)"
    )
