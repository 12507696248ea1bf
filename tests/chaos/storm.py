"""Eight writers and eight subscribers on four conversations, while something happens to the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.chaos.client import Place, Session, Subscriber, Writer
from tests.chaos.history import History
from tests.chaos.server import Server

CONVERSATIONS, WRITERS_EACH, SUBSCRIBERS_EACH = 4, 2, 2


class Traffic:
    """The clients of a storm, while they run."""

    def __init__(self, place: Place, history: History) -> None:
        self.history = history
        self.conversations: list[str] = []
        self.writers: list[Writer] = []
        self.subscribers: list[Subscriber] = []
        self._place = place
        self._enough = asyncio.Event()
        self._writing: list[asyncio.Task[None]] = []

    async def begin(self, stack: AsyncExitStack) -> None:
        """Make the conversations and set everybody to work."""
        for nth in range(CONVERSATIONS):
            async with Session.open(self._place.port) as session:
                id = session.introduction["conversation"]
            self.conversations.append(id)
            names = [(kind, f"{kind}-{nth}-{n}") for kind, count in KINDS for n in range(count)]
            for kind, name in names:
                make, everybody = (
                    (Writer, self.writers) if kind == "writer" else (Subscriber, self.subscribers)
                )
                everybody.append(await stack.enter_async_context(make(name, self._place, id, self.history)))
        self._writing = [asyncio.create_task(writer.write(self._enough)) for writer in self.writers]
        stack.push_async_callback(self._stop)

    async def finish(self) -> None:
        """Let every writer get its last answer, and every subscriber what there is to see."""
        self._enough.set()
        await asyncio.gather(*self._writing)
        for subscriber in self.subscribers:
            await subscriber.reach(await subscriber.head())

    async def _stop(self) -> None:
        for task in self._writing:
            task.cancel()
        await asyncio.gather(*self._writing, return_exceptions=True)


KINDS = (("writer", WRITERS_EACH), ("subscriber", SUBSCRIBERS_EACH))


@asynccontextmanager
async def traffic(server: Server, history: History) -> AsyncIterator[Traffic]:
    """Start the clients of a storm on a running server; leaving ends them at once."""
    async with AsyncExitStack() as stack:
        clients = Traffic(server, history)
        await clients.begin(stack)
        yield clients


async def talked(server: Server, history: History, messages: int, text: str = "x") -> tuple[str, int]:
    """A conversation with some messages and their turns, and its last seq when all is said."""
    async with Session.open(server.port) as session:
        id = session.introduction["conversation"]
    async with (
        Writer("first", server, id, history) as writer,
        Subscriber("watch", server, id, History()) as watch,
    ):
        for _ in range(messages):
            await writer.effect("send_message", text=text)
        return id, await settled(watch)


async def settled(watch: Subscriber) -> int:
    """The last seq of a conversation once no turn runs any more."""
    while (state := await watch.ask("conversation.state"))["state"] in ("running", "awaiting"):
        await watch.news(1)
    await watch.reach(state["head_seq"])
    return state["head_seq"]
