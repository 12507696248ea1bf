"""Which server client commands talk to, with which key; and the workspace that was typed after `--workspace`."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from agent_sdk import LocalWorkspace
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, NotADirectory, PathDenied, PathNotFound
from agent_sdk.remote.connection import checked_key, checked_url
from agent_sdk.remote.server import AgentServer
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace.contract import Workspace
from agent_server.cli.terminal import STDERR, one_line, open_terminal
from agent_server.config.options import ClientEnvironment, client_environment
from agent_server.config.sources import is_loopback

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_FILE = "api_key"
CONTAINER = "docker:"
OWN_IMAGE = "agent-server:latest"


class Server(Struct, frozen=True, kw_only=True):
    """A server as a client sees it."""

    url: str
    api_key: str | None = None

    def __repr__(self) -> str:
        return f"Server(url={self.url!r})"

    def administration(self) -> AgentServer:
        """Return what lists and removes its conversations."""
        return AgentServer(self.url, self.api_key)

    def workspace(
        self, *, conversation: str | None = None, working_dir: str | None = None
    ) -> RemoteWorkspace:
        """Return the workspace of an existing conversation, or a fresh one."""
        return RemoteWorkspace(
            self.url,
            self.api_key,
            conversation=conversation,
            working_dir=working_dir,
            on_connection=tell,
        )


async def tell(reason: AgentServerError | None) -> None:
    """Say why nothing happens, and when it goes on."""
    text = "connected again" if reason is None else f"{one_line(str(reason))} (trying again)"
    with suppress(OSError):
        await open_terminal(STDERR).line(f"agent-server: {text}", "dim")


def find_server(given: argparse.Namespace, url: str | None = None) -> Server:
    """Return the server that the options, else the environment, name.

    The key is that of the options, else of the environment, else, for a server of this machine, of the
    data folder of this user.

    Raises:
        InvalidParams: the URL or the key makes no sense.
        PathNotFound, PathDenied: the given key file cannot be read.
    """
    environment = client_environment()
    address = checked_address(url or given.url or environment.url or DEFAULT_URL)
    return Server(url=address, api_key=_key(given, environment, urlsplit(address).hostname or ""))


def checked_address(given: str) -> str:
    """Return the URL of a server.

    Raises:
        InvalidParams: it is none.
    """
    address = given.strip()
    if not address.startswith(("http://", "https://")):
        raise InvalidParams(f"{address!r} is no URL of a server; it looks like {DEFAULT_URL}")
    return checked_url(address)


def _key(given: argparse.Namespace, environment: ClientEnvironment, host: str) -> str | None:
    if given.api_key:
        return checked_key(given.api_key, "--api-key")
    if given.api_key_file:
        return _read_key(Path(given.api_key_file))
    if environment.api_key:
        return checked_key(environment.api_key, "AGENT_SERVER_API_KEY")
    if environment.api_key_file:
        return _read_key(Path(environment.api_key_file))
    own = environment.data / KEY_FILE
    return _read_key(own) if is_loopback(host) and own.exists() else None


def _read_key(file: Path) -> str | None:
    try:
        return checked_key(file.expanduser().read_text(encoding="ascii"), str(file))
    except FileNotFoundError:
        raise PathNotFound(f"{file}: no such API key file", path=str(file)) from None
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not ASCII text"
        raise PathDenied(f"{file}: the API key cannot be read: {reason}", path=str(file)) from None


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
