"""agent-server ls: the conversations of a server, newest first."""

from __future__ import annotations

import argparse
from contextlib import suppress
from datetime import datetime

import aiohttp
import msgspec

from agent_sdk.outbound import proxy_for, trusted
from agent_sdk.protocol.results import Snapshot
from agent_sdk.remote.refusal import LONGEST_BODY, refused, unreachable
from agent_server.client import Server, find_server
from agent_server.outlet import Outlet
from agent_server.terminal import STDOUT, Style, json_line, one_line, open_terminal

HEAD = ("CONVERSATION", "STATE", "UPDATED", "EVENTS", "MODEL", "TITLE")
ANSWER_SECONDS = 30.0
_STYLES: dict[str, Style] = {"running": "green", "awaiting": "yellow", "failed": "red"}


async def main(given: argparse.Namespace) -> int:
    """Show them: a table, or one JSON object per line."""
    found = await conversations(find_server(given))
    if given.json:
        await Outlet(STDOUT).write(b"".join(json_line(msgspec.json.encode(snapshot)) for snapshot in found))
        return 0
    terminal = open_terminal()
    if not found:
        await terminal.line("no conversations yet")
        return 0
    rows = [_row(snapshot) for snapshot in found]
    widths = [max(len(row[column]) for row in [HEAD, *rows]) for column in range(len(HEAD))]
    await terminal.line(_line(HEAD, widths), "bold")
    for snapshot, row in zip(found, rows, strict=True):
        await terminal.line(_line(row, widths), _STYLES.get(snapshot.state, ""))
    return 0


async def conversations(server: Server) -> list[Snapshot]:
    """Ask for the conversations of a server, newest first, at most 1000.

    Raises:
        ConnectionLost: nobody answers there, or it is no agent server.
        Unauthorized, Overloaded, …: the server refuses.
    """
    url, key = server.url, server.api_key
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as session,
            session.get(
                f"{url}/v1/conversations?limit=1000",
                headers={"Authorization": f"Bearer {key}"} if key else {},
                allow_redirects=False,
                proxy=proxy_for(url),
                ssl=await trusted(url),
            ) as answer,
        ):
            body = await answer.read()
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise unreachable(url, exc) from None
    if answer.status == 200:
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.json.decode(body, type=list[Snapshot])
    raise refused(url, answer.status, answer.headers, body[:LONGEST_BODY], api_key=key)


def _row(snapshot: Snapshot) -> tuple[str, ...]:
    updated = datetime.fromtimestamp(snapshot.updated_at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    title = one_line(snapshot.title or "")
    return (
        one_line(snapshot.id),
        _state(snapshot),
        updated,
        str(snapshot.head_seq),
        one_line(snapshot.model or "-"),
        title if len(title) <= 60 else f"{title[:59]}…",
    )


def _state(snapshot: Snapshot) -> str:
    """The state, and in a word each what the agent lacks."""
    waits = ", ".join(dict.fromkeys(wait.what for wait in snapshot.waits))
    return f"{snapshot.state} ({waits})" if waits else snapshot.state


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
