"""agent-server prune: remove the conversations that nobody has used for long."""

from __future__ import annotations

import argparse
import time

from agent_sdk.protocol.errors import ConversationNotFound, InvalidParams, StateConflict
from agent_sdk.protocol.results import BUSY
from agent_server.cli.client import find_server
from agent_server.cli.terminal import open_terminal

PAGE = 500


async def main(given: argparse.Namespace) -> int:
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
