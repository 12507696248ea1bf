"""agent-server rm: remove conversations with their logs and workspaces."""

from __future__ import annotations

import argparse
import sys

from agent_sdk.protocol.errors import ConversationNotFound
from agent_server.client import find_server
from agent_server.terminal import open_terminal


async def main(given: argparse.Namespace) -> int:
    """Remove them; one that does not exist is told, and the others are removed all the same."""
    server, code = find_server(given).administration(), 0
    for id in given.ids:
        try:
            await server.delete(id)
        except ConversationNotFound:
            sys.stderr.write(f"agent-server: no conversation {id!r}; agent-server ls shows those there are\n")
            code = 1
        else:
            await open_terminal().line(f"removed {id}")
    return code
