"""The conversations of a server: ls shows them, rm removes some, prune those that nobody has used for long."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime

from agent_sdk.protocol.errors import ConversationNotFound, InvalidParams, StateConflict
from agent_sdk.protocol.results import BUSY, Snapshot
from agent_server.cli.client import find_server
from agent_server.cli.terminal import Style, one_line, open_terminal, print_json

HEAD = ("CONVERSATION", "STATE", "UPDATED", "EVENTS", "MODEL", "TITLE")
PAGE = 500
_STYLES: dict[str, Style] = {"running": "green", "awaiting": "yellow", "failed": "red"}


async def list_them(given: argparse.Namespace) -> int:
    """Show them, newest first: a table, or one JSON object per line."""
    if len(dict(given.tag)) < len(given.tag):
        raise InvalidParams("--tag: a NAME is given twice, and no conversation has two values of it")
    found = await find_server(given).administration().conversations(dict(given.tag), given.state, given.limit)
    if given.json:
        await print_json(found)
    elif found:
        rows = [(_cells(snapshot), _STYLES.get(snapshot.state, "")) for snapshot in found]
        await open_terminal().table(HEAD, rows)
    else:
        await open_terminal().line("no conversations yet")
    return 0


def _cells(snapshot: Snapshot) -> tuple[str, ...]:
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


async def remove(given: argparse.Namespace) -> int:
    """Remove some with their logs and workspaces.

    One that does not exist, or is busy, is told, and the others are removed all the same.
    """
    server, code = find_server(given).administration(), 0
    for id in given.ids:
        try:
            await server.delete(id, unless_busy=not given.force)
        except ConversationNotFound:
            sys.stderr.write(f"agent-server: no conversation {id!r}; agent-server ls shows those there are\n")
            code = 1
        except StateConflict as exc:
            state = exc.details.get("state", "busy")
            sys.stderr.write(
                f"agent-server: conversation {id} is {state}; rm --force removes it all the same\n"
            )
            code = 1
        else:
            await open_terminal().line(f"removed {id}")
    return code


async def prune(given: argparse.Namespace) -> int:
    """Remove those that are old and idle enough, and in which nothing goes on; says how many."""
    if given.older_than is None and given.idle is None:
        raise InvalidParams("say which: --older-than 30d, --idle 7d, or both")
    now, removed, before = time.time(), 0, None
    server = find_server(given).administration()
    while page := await server.conversations(limit=PAGE, before=before):
        before = page[-1].id
        for each in page:
            old = now - each.created_at >= (given.older_than or 0)
            idle = now - each.updated_at >= (given.idle or 0)
            if old and idle and each.state not in BUSY:
                try:
                    await server.delete(each.id, unless_busy=True)
                except (ConversationNotFound, StateConflict):  # somebody was faster
                    continue
                removed += 1
    await open_terminal().line(f"removed {removed} conversations")
    return 0
