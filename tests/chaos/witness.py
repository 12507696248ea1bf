"""A client in a process of its own, so that it can be frozen: prints the seq of each event it is given.

`python -m tests.chaos.witness PORT CONVERSATION`; it ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys

from agent_sdk import Conversation, RemoteWorkspace
from tests.chaos.server import KEY


def tell(event) -> None:
    print(event.seq, flush=True)


async def main(port: str, conversation: str) -> None:
    async with (
        RemoteWorkspace(f"http://127.0.0.1:{port}", KEY, conversation=conversation) as workspace,
        Conversation(None, workspace, since=0, callbacks=[tell]),
    ):
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
