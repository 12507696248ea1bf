"""The events of a conversation on their way to one connection: from the log first, then live, without gap
or repetition.

Pages of the log are sent until it has no more; in the very step in which that shows, the connection
begins to listen. Of events none is kept aside meanwhile, so a long replay costs no memory, and a reader that
is slow during the replay is waited for. Deltas that come meanwhile take their place behind the events that
they followed, as far as 64 KiB hold them: whoever sends a message right after connecting misses no beginning
of its answer. A live reader that does not keep up misses deltas first. When the
budget of its connection is full it is not live any more: nothing is queued for it, and it catches up from
the log as soon as half of the budget is free. One that is over its budget for `patience` seconds, or takes
nothing at all for so long, is cut off (4408), and resumes later where it stopped.

For curl, browsers and dashboards there are Server-Sent Events: these are read from the log whenever there is something
new in it, so a slow reader costs nothing but its connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine

from aiohttp import web

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import AgentServerError, ConversationNotFound, LimitExceeded
from agent_sdk.protocol.methods.connection import SyncReset
from agent_sdk.rpc.peer import SLOW_READER, TOO_BIG, Peer
from agent_server.conversations.loaded import LoadedConversation

GONE, UNREADABLE = 4404, 1011
EARLY_BYTES = 64 << 10
"""Of deltas kept during a replay; when more come, those so far are left out."""
KEEP_ALIVE_SECONDS = 15.0
"""Silence after which a comment is sent, so that proxies do not cut the connection."""
STUCK_SECONDS = 30.0
RETRY_MS = 1000

Stop = Callable[[], None]
OnStuck = Callable[[int, str], None]
OnBug = Callable[[BaseException], None]


class Subscription:
    """One connection's subscription. Close it."""

    def __init__(
        self, source: LoadedConversation, peer: Peer, on_stuck: OnStuck, on_bug: OnBug, *, patience: float
    ) -> None:
        """Make one that does nothing yet.

        Args:
            source: the conversation.
            peer: where they go to.
            on_stuck: told (close code, reason) when they cannot get there.
            on_bug: told of an unexpected exception, after which nothing more is sent.
            patience: seconds for a reader that does not keep up.
        """
        self._source = source
        self._peer = peer
        self._on_stuck = on_stuck
        self._on_bug = on_bug
        self._patience = patience
        self._epoch = source.epoch
        self._last = 0
        self._full = False
        """Whether the budget was used up, and half of it has not been free since."""
        self._stuck = False
        """Whether the reader was given up."""
        self._replay: asyncio.Task[None] | None = None
        self._early: deque[tuple[int, bytes]] = deque()
        """Deltas that came during the replay, with the seq of the event before them."""
        self._early_bytes = 0
        self._stops: tuple[Stop, ...] = ()

    def __repr__(self) -> str:
        return f"<Subscription at seq {self._last}, {'behind' if self._replay is not None else 'live'}>"

    def begin(self, epoch: str | None, after: int) -> None:
        """Replay what comes after a cursor, then be live.

        Args:
            epoch: of the log that `after` is from; None: of this one.
        """
        self._stops = (self._source.subscribe_deltas(self._keep),)
        self._begin_replay(self._from(epoch, after))

    def close(self) -> None:
        """Send nothing more."""
        self._stop_listening()
        if self._replay is not None:
            self._replay.cancel()

    def _position(self, epoch: str | None, after: int) -> None:
        """Decide where to begin, and tell the client when that is not where it wanted to."""
        reason = None
        if epoch is not None and epoch != self._epoch:
            reason = "the log was made anew"
        elif after > self._source.head_seq:
            reason = f"the log ends at {self._source.head_seq}, before {after}"
        if reason is None:
            self._last = after
        else:
            self._peer.notify(SyncReset(reason=reason, epoch=self._epoch, from_seq=1))

    # --- from the log ---

    def _begin_replay(self, replay: Coroutine[None, None, None]) -> None:
        self._replay = asyncio.create_task(replay)
        self._replay.add_done_callback(self._replayed)

    def _replayed(self, replay: asyncio.Task[None]) -> None:
        self._replay = None
        match None if replay.cancelled() else replay.exception():
            case None:
                pass
            case ConversationNotFound():
                self._on_stuck(GONE, "the conversation was deleted")
            case AgentServerError() as error:
                self._on_stuck(UNREADABLE, str(error))
            case bug:
                self._on_bug(bug)

    async def _from(self, epoch: str | None, after: int) -> None:
        self._position(epoch, after)
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Send pages until there are no more, then listen; or give the reader up."""
        while await self._room():
            page = await self._source.page(self._last)
            if not page and self._source.head_seq <= self._last:
                self._listen()
                return
            for seq, event in page:
                if not await self._send_when_it_fits(seq, event):
                    return

    async def _send_when_it_fits(self, seq: int, event: bytes) -> bool:
        while not self._send(seq, event):
            if self._stuck or not await self._room(len(event)):
                return False
        return True

    async def _room(self, size: int = 0) -> bool:
        """Wait until half the budget is free and so many bytes fit; False: the reader is gone or was given up."""
        while True:
            frames = self._peer.frames_left
            try:
                async with asyncio.timeout(self._patience):
                    there = await self._peer.room(size)
            except TimeoutError:
                moves = frames != self._peer.frames_left
                if moves and (not self._full or self._peer.sends_long_event):
                    continue
                self._give_up(SLOW_READER, "events are not read fast enough; resume after the last one")
                return False
            self._full = False
            return there

    # --- live ---

    def _listen(self) -> None:
        self._stop_listening()
        self._send_early(self._last)
        self._stops = (
            self._source.subscribe(self._live),
            self._source.subscribe_deltas(self._peer.publish_delta),
        )

    def _stop_listening(self) -> None:
        for stop in self._stops:
            stop()
        self._stops = ()

    def _live(self, seq: int, event: bytes) -> None:
        if seq > self._last and not self._send(seq, event):
            self._stop_listening()
            if not self._stuck:
                self._full = True
                self._begin_replay(self._catch_up())

    def _keep(self, delta: bytes) -> None:
        self._early.append((self._source.head_seq, delta))
        self._early_bytes += len(delta)
        if self._early_bytes > EARLY_BYTES:
            self._early.clear()
            self._early_bytes = 0

    def _send_early(self, last: int) -> None:
        while self._early and self._early[0][0] <= last:
            _, delta = self._early.popleft()
            self._early_bytes -= len(delta)
            self._peer.publish_delta(delta)

    def _send(self, seq: int, event: bytes) -> bool:
        self._send_early(seq - 1)
        try:
            sent = self._peer.publish(event, epoch=self._epoch)
        except LimitExceeded as exc:
            self._give_up(TOO_BIG, f"event {seq}: {exc}")
            return False
        if sent:
            self._last = seq
        return sent

    def _give_up(self, code: int, reason: str) -> None:
        self._stuck = True
        self._on_stuck(code, reason)


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
        await cancel_and_wait(*waiting)
