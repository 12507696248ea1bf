"""agent-server cp: one file into or out of a workspace, whole and verified, or not at all."""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath

from agent_sdk import RemoteWorkspace
from agent_sdk.protocol.errors import InvalidParams, IsADirectory, NotARegularFile
from agent_sdk.workspace import Transferred, Workspace
from agent_server.places import entered
from agent_server.terminal import one_line, open_terminal

MARK = ":"


async def main(given: argparse.Namespace) -> int:
    """Copy it and say what was copied."""
    into = given.target.startswith(MARK)
    if given.source.startswith(MARK) == into:
        raise InvalidParams(
            "one of SRC and DST is a path in the workspace and starts with `:`, the other is a path of this machine, "
            "e.g. agent-server cp data.csv :in/data.csv"
        )
    async with entered(given) as workspace:
        try:
            target, done = await (_upload if into else _download)(workspace, given.source, given.target)
        except (IsADirectory, NotARegularFile) as exc:
            raise type(exc)(
                f"{exc}; cp copies single files: pack a folder with tar first", **exc.details
            ) from None
        where = ""
        if isinstance(workspace, RemoteWorkspace) and given.conversation is None:
            where = f", in the workspace of conversation {workspace.conversation}"
    summary = f"{given.source} -> {target}: {done.size} bytes, sha256 {done.sha256}{where}"
    await open_terminal().line(one_line(summary))
    return 0


async def _upload(workspace: Workspace, source: str, target: str) -> tuple[str, Transferred]:
    path = target.removeprefix(MARK)
    if not path or path.endswith("/"):
        path += Path(source).name
    return f"{MARK}{path}", await workspace.upload(source, path)


async def _download(workspace: Workspace, source: str, target: str) -> tuple[str, Transferred]:
    path = source.removeprefix(MARK)
    file = _below(Path(target), PurePosixPath(path).name)
    return str(file), await workspace.download(path, file)


def _below(target: Path, name: str) -> Path:
    return target / name if target.is_dir() else target
