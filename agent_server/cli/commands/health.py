"""agent-server health: whether a server answers; for health checks of containers and supervisors."""

from __future__ import annotations

import argparse
from pathlib import Path

import aiohttp
import msgspec
from msgspec import Struct

from agent_sdk.protocol.errors import ConnectionLost, PathNotFound
from agent_sdk.remote.connection import LONGEST_BODY, nowhere, refused, unreachable
from agent_server.cli.client import checked_address
from agent_server.cli.terminal import one_line, open_terminal
from agent_server.config.options import client_environment, load_given
from agent_server.data_folder import address_in

ANSWER_SECONDS = 4.0
"""Less than what health checks wait by default."""


class _Health(Struct):
    status: str
    degraded: list[str] = []


async def main(given: argparse.Namespace) -> int:
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
    except msgspec.DecodeError:
        pass
    if ours and answer.status in (401, 404):  # the right address asks for no key
        raise ConnectionLost(nowhere(url))
    raise refused(url, answer.status, answer.headers, body[:LONGEST_BODY], api_key=None)


def _own(given: argparse.Namespace) -> str:
    """Where the server of a data folder listens."""
    config = load_given(given)
    address = address_in(Path(config.data))
    if address is None:
        raise PathNotFound(
            f"no server runs with the data folder {config.data}; name it with --data, "
            "or its address with --url or AGENT_SERVER_URL",
            path=config.data,
        )
    return address
