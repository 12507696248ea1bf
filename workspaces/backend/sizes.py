"""Sizes as people write them: `512m`."""

from __future__ import annotations

import re

from agent_sdk.protocol.errors import InvalidParams

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(field: str, text: str, *, least: str = "1b") -> int:
    """Return bytes for a number with a unit of `b`, `k`, `m`, `g` or `t` (powers of 1024).

    Raises:
        InvalidParams: it is no size, or below `least`; the sentence names the field.
    """
    size = _bytes(text)
    if size is None:
        raise InvalidParams(f"{field}: {text[:64]!r} is no size; write a number and a unit, like 512m")
    if size < (_bytes(least) or 0):
        raise InvalidParams(f"{field}: {text} is too small; give it {least} or more")
    return size


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([bkmgt]?)(?:i?b)?", text.strip().lower())
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
