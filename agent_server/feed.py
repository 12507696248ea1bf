"""The events of a conversation on their way to one connection: from the log first, then live, without gap
or repetition.

Pages of the log are sent until it has no more; in the very step in which that shows, the connection
begins to listen. Nothing is kept aside meanwhile, so a long replay costs no memory, and a reader that
is slow during the replay is waited for. A live reader is not: when too much waits for it, it is cut off (4408) and
resumes later where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agent_sdk.protocol.errors import LimitExceeded
from agent_sdk.protocol.methods import SyncReset
from agent_sdk.rpc.peer import Peer

SLOW_READER = 4408
TOO_BIG = 4413

Stop = Callable[[], None]
OnStuck = Callable[[int, str], None]


class Source(Protocol):
    """A conversation, as far as its events go."""

    @property
    def epoch(self) -> str:
        """Of the log."""
        ...

    @property
    def head_seq(self) -> int:
        """The seq of the last event."""
        ...

    async def page(self, after: int) -> list[tuple[int, bytes]]:
        """Return the next events after a seq, as (seq, JSON); empty at the end of the log."""
        ...

    def subscribe(self, listener: Callable[[int, bytes], None]) -> Stop:
        """Call with every event from now on; returns what ends it."""
        ...

    def subscribe_deltas(self, listener: Callable[[bytes], None]) -> Stop:
        """Call with every delta from now on; returns what ends it."""
        ...


class Feed:
    """One connection's subscription."""

    def __init__(self, source: Source, peer: Peer, on_stuck: OnStuck) -> None:
        """Take where events come from and go to, and whom to tell (close code, reason) when they cannot get there."""
        self._source = source
        self._peer = peer
        self._on_stuck = on_stuck
        self._epoch = source.epoch
        self._last = 0
        self._stops: list[Stop] = []

    async def run(self, epoch: str | None, after: int) -> None:
        """Replay what comes after a cursor, then listen; returns when the connection is live.

        Args:
            epoch: of the log that `after` is from; None: of this one.
        """
        self._position(epoch, after)
        while True:
            page = await self._source.page(self._last)
            if not page and self._source.head_seq <= self._last:
                break
            for seq, event in page:
                if not self._send(seq, event):
                    return
            await self._peer.room()
        self._stops.append(self._source.subscribe(self._live))
        self._stops.append(self._source.subscribe_deltas(self._peer.publish_delta))

    def close(self) -> None:
        """Stop listening."""
        for stop in self._stops:
            stop()
        self._stops.clear()

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

    def _live(self, seq: int, event: bytes) -> None:
        if seq > self._last and not self._send(seq, event):
            self.close()

    def _send(self, seq: int, event: bytes) -> bool:
        self._last = seq
        try:
            sent = self._peer.publish(event, epoch=self._epoch)
        except LimitExceeded as exc:
            self._on_stuck(TOO_BIG, f"event {seq}: {exc}")
            return False
        if not sent:
            self._on_stuck(SLOW_READER, "events are not read fast enough; resume after the last one")
        return sent
