"""The events of a conversation as Server-Sent Events, for curl, browsers and dashboards.

It reads the log whenever there is something new in it, so a slow reader costs nothing but its connection.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from agent_sdk.protocol.errors import AgentServerError
from agent_server.conversations.loaded import LoadedConversation

KEEP_ALIVE_SECONDS = 15.0
"""Silence after which a comment is sent, so that proxies do not cut the connection."""
STUCK_SECONDS = 30.0
RETRY_MS = 1000


class Reader:
    """A client without a Peer."""

    peer = None

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.dismissed = False

    def dismiss(self, code: int, reason: str) -> None:
        """End the stream."""
        self.dismissed = True
        self.news.set()


async def stream_events(
    request: web.Request, loaded: LoadedConversation, after: int, ending: asyncio.Event
) -> web.StreamResponse:
    """Send the events after a seq, then live ones, until the client or the conversation goes, or `ending` is set.

    A seq that the log does not have begins with the event `sync.reset`, and then from the start.
    """
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
    response.content_length = None
    response.force_close()
    await response.prepare(request)
    await response.write(f"retry: {RETRY_MS}\n\n".encode())
    reader = Reader()
    news = reader.news
    stop = loaded.subscribe(lambda seq, event: news.set())
    loaded.connections.add(reader)
    try:
        if after > loaded.head_seq:
            await response.write(b'event: sync.reset\ndata: {"from_seq":1}\n\n')
            after = 0
        while not (ending.is_set() or reader.dismissed):
            news.clear()
            for seq, event in await loaded.page(after):
                after = seq
                await _write(response, b"id: %d\ndata: %b\n\n" % (seq, event))
            if loaded.head_seq > after:
                continue
            if not await _anything_new(news, ending):
                await _write(response, b": still here\n\n")
    except (ConnectionError, TimeoutError):
        pass  # the client is gone, or reads nothing any more
    except AgentServerError:
        pass  # the log is gone or cannot be read: whoever asks again is told with a status
    finally:
        loaded.connections.discard(reader)
        stop()
    return response


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(STUCK_SECONDS):
        await response.write(data)


async def _anything_new(news: asyncio.Event, ending: asyncio.Event) -> bool:
    """Wait for news, the end, or the time to give a sign of life."""
    waiting = [asyncio.ensure_future(news.wait()), asyncio.ensure_future(ending.wait())]
    try:
        done, _ = await asyncio.wait(waiting, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
