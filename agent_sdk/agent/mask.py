"""Keeping secrets out of what the model reads and the log keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

HIDDEN = "<secret-hidden>"
SHORTEST = 8
"""Characters; a shorter value would blank out ordinary words."""


class Mask:
    """Replaces the given values, and each line of a value of several lines, by `<secret-hidden>`."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        pieces = {
            piece for value in values for piece in (value, *value.splitlines()) if len(piece) >= SHORTEST
        }
        longest_first = sorted(pieces, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if pieces else None

    def text(self, text: str) -> str:
        """Return the text without the values."""
        return self._pattern.sub(HIDDEN, text) if self._pattern else text

    def data(self, value: Any) -> Any:
        """Return JSON-able data without the values, however deep they are."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.data(key): self.data(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item) for item in value]
        return value
