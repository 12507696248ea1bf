"""What files held before they were edited."""

from __future__ import annotations

from collections import OrderedDict, deque

KEPT_PER_FILE = 10
KEPT_BYTES = 64 << 20
"""Of all files together; beyond it the file that was edited longest ago is forgotten."""


class Undo:
    """The last states of each file, in memory. None stands for a file that did not exist."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, deque[bytes | None]] = OrderedDict()

    def remember(self, path: str, data: bytes | None) -> None:
        """Keep what a file holds before an edit."""
        self._states.setdefault(path, deque(maxlen=KEPT_PER_FILE)).append(data)
        self._states.move_to_end(path)
        while len(self._states) > 1 and self._bytes() > KEPT_BYTES:
            self._states.popitem(last=False)

    def take(self, path: str) -> tuple[bytes | None] | None:
        """Take out the last state of a file, in a tuple; None when there is none."""
        states = self._states.get(path)
        return (states.pop(),) if states else None

    def _bytes(self) -> int:
        return sum(len(data or b"") for states in self._states.values() for data in states)
