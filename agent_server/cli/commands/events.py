"""agent-server events: the log of a conversation, from a seq, to its end or for as long as it goes on."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

from agent_sdk import Conversation, Event
from agent_server.cli.client import find_server
from agent_server.cli.viewer import Viewer, open_viewer, tell_waits


async def main(given: argparse.Namespace) -> int:
    """Show the events."""
    viewer = open_viewer(json=given.json)
    async with find_server(given).workspace(conversation=given.id) as workspace:
        conversation = Conversation(None, workspace, id=given.id)
        async with conversation:
            await tell_waits(conversation)
            await viewer.watch(_show(conversation.events(given.since, given.follow), viewer))
    return 0


async def _show(events: AsyncIterator[Event], viewer: Viewer) -> None:
    async for event in events:
        await viewer.event(event)
