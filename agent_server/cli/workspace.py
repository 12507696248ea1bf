"""From what was typed after `--workspace` to a workspace."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent_sdk import LocalWorkspace
from agent_sdk.protocol.errors import InvalidParams, NotADirectory, PathNotFound
from agent_sdk.workspace.contract import Workspace
from agent_server.cli.client import find_server, tell

CONTAINER = "docker:"
OWN_IMAGE = "agent-server:latest"


@asynccontextmanager
async def entered(given: argparse.Namespace) -> AsyncIterator[Workspace]:
    """Enter the workspace that the options name; the present folder when they name none.

    Raises:
        InvalidParams: the options contradict each other.
        PathNotFound, NotADirectory: there is no such folder.
        EngineUnavailable, ImageUnavailable, WorkspaceUnavailable: a container cannot be started.
    """
    place = given.workspace
    if place is not None and place.startswith(CONTAINER):
        async with _container(given, place.removeprefix(CONTAINER)) as inside:
            yield inside
        return
    remote = place is not None and "://" in place
    if remote and given.url:
        raise InvalidParams("--workspace URL and --url name a server each; use one of them")
    if given.conversation is not None:
        if place is not None and not remote:
            raise InvalidParams(
                "--conversation names a workspace of a server; leave out --workspace, or give it the URL"
            )
        async with find_server(given, place).workspace(conversation=given.conversation) as workspace:
            yield workspace
    elif remote or (place is None and given.url):
        async with find_server(given, place).workspace(working_dir=given.working_dir) as fresh:
            yield fresh
    else:
        if given.working_dir is not None:
            raise InvalidParams(
                "--working-dir is a folder of a server's machine; name the server with --workspace URL"
            )
        async with LocalWorkspace(_folder(place or ".")) as here:
            yield here


def _container(given: argparse.Namespace, image: str) -> Workspace:
    if given.url or given.conversation is not None:
        raise InvalidParams(
            "--workspace docker:IMAGE starts a server of its own; leave out --url and --conversation"
        )
    from workspaces.docker import DockerWorkspace  # noqa: PLC0415  what other places never need

    return DockerWorkspace(image or OWN_IMAGE, working_dir=given.working_dir, on_connection=tell)


def _folder(place: str) -> str:
    path = Path(place).expanduser()
    if not path.exists():
        raise PathNotFound(
            f"{place}: no such folder; --workspace takes a folder, a server's URL or docker:IMAGE", path=place
        )
    if not path.is_dir():
        raise NotADirectory(
            f"{place}: not a folder; --workspace takes a folder, a server's URL or docker:IMAGE", path=place
        )
    return str(path)
