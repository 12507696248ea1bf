"""Credit arithmetic of byte streams: how much may be sent, when to allow more.

Both ends count payload bytes since the stream began. The receiver publishes how many may have been
sent in all; so a credit that arrives twice or late does no harm, and memory is bounded by one
window per stream. Offsets are positions in what is being sent; they may jump ahead, never back.
"""

from __future__ import annotations

from agent_sdk.protocol.errors import BadBinaryHeader


class SendWindow:
    """The sender's view."""

    __slots__ = ("_allowed", "_sent")

    def __init__(self, size: int) -> None:
        self._allowed = size
        self._sent = 0

    @property
    def room(self) -> int:
        """Bytes that may be sent now."""
        return self._allowed - self._sent

    def take(self, wanted: int) -> int:
        """Use up to `wanted` bytes of the room; returns how many may be sent now, 0: wait for credit."""
        taken = min(wanted, self._allowed - self._sent)
        self._sent += taken
        return taken

    def granted(self, allowed: int) -> bool:
        """The receiver allows so many bytes in all; returns whether that is more than before.

        Raises:
            BadBinaryHeader: less than before. Credit is never taken back.
        """
        if allowed < self._allowed:
            raise BadBinaryHeader(f"credit went back from {self._allowed} to {allowed}")
        more = allowed > self._allowed
        self._allowed = allowed
        return more


class ReceiveWindow:
    """The receiver's view."""

    __slots__ = ("_allowed", "_consumed", "_received", "_size", "ended", "position")

    def __init__(self, size: int) -> None:
        self._size = size
        self._allowed = size
        self._received = 0
        self._consumed = 0
        self.position = 0
        """Where the next byte belongs."""
        self.ended = False

    @property
    def held(self) -> int:
        """Bytes that arrived and were not consumed yet."""
        return self._received - self._consumed

    @property
    def expected(self) -> int:
        """Bytes that may still come in with the credit given so far."""
        return 0 if self.ended else self._allowed - self._received

    def arrived(self, offset: int, length: int) -> None:
        """Bytes came in.

        Raises:
            BadBinaryHeader: past the credit, behind the position, or after the end.
        """
        if offset < self.position or self.ended:
            raise self._misplaced(offset)
        if self._received + length > self._allowed:
            raise BadBinaryHeader(f"{self._received + length - self._allowed} bytes more than the credit")
        self._received += length
        self.position = offset + length

    def end(self, offset: int) -> None:
        """The sender is done; its last position is `offset`.

        Raises:
            BadBinaryHeader: behind the position, or a second end.
        """
        if offset < self.position or self.ended:
            raise self._misplaced(offset)
        self.position = offset
        self.ended = True

    def consumed(self, length: int, *, any_room: bool = False) -> int | None:
        """Bytes were used up; returns the new total to publish, or None while that is not worth a frame.

        It is worth one when half a window became free (`any_room`: anything), and not any more when the
        sender is done.
        """
        self._consumed += length
        allowed = self._consumed + self._size
        if self.ended or (allowed - self._allowed < self._size // 2 and not any_room):
            return None
        self._allowed = allowed
        return allowed

    def _misplaced(self, offset: int) -> BadBinaryHeader:
        if self.ended:
            return BadBinaryHeader("a frame after the end of its stream")
        return BadBinaryHeader(f"offset went back from {self.position} to {offset}")
