"""agent-server rm: remove conversations with their logs and workspaces."""

from __future__ import annotations

import argparse
import sys

from agent_sdk.protocol.errors import ConversationNotFound, StateConflict
from agent_server.cli.client import find_server
from agent_server.cli.terminal import open_terminal


async def main(given: argparse.Namespace) -> int:
    """Remove them; one that does not exist, or is busy, is told, and the others are removed all the same."""
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
