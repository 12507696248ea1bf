"""Identities that are made where they are needed: UUIDs of version 7 (RFC 9562), which sort by time."""

from __future__ import annotations

import os
import time


def new_id() -> str:
    """Return a fresh UUIDv7 as lower-case text: 48 bits of Unix milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (2**48 - 1)) << 80 | 7 << 76 | (random >> 68) << 64
    value |= 2 << 62 | random & (2**62 - 1)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
