"""agent-server ls: the conversations of a server, newest first."""

from __future__ import annotations

import argparse
from datetime import datetime

import msgspec

from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.results import Snapshot
from agent_server.cli.client import find_server
from agent_server.cli.stdio import Outlet
from agent_server.cli.terminal import STDOUT, Style, json_line, one_line, open_terminal

HEAD = ("CONVERSATION", "STATE", "UPDATED", "EVENTS", "MODEL", "TITLE")
_STYLES: dict[str, Style] = {"running": "green", "awaiting": "yellow", "failed": "red"}


async def main(given: argparse.Namespace) -> int:
    """Show them: a table, or one JSON object per line."""
    if len(dict(given.tag)) < len(given.tag):
        raise InvalidParams("--tag: a NAME is given twice, and no conversation has two values of it")
    found = await find_server(given).administration().conversations(dict(given.tag), given.state, given.limit)
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
