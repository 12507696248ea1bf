"""What proves that rows are what was written: a hash chain over the events, a sum over each other row.

SQLite finds a page that makes no sense; a page that makes sense and is not the one that was written
(a flipped bit, a write that never reached the disk) is found here, whenever it is read.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

CHAIN_BYTES = 16
SUM_BYTES = 8


class ChainBroken(Exception):
    """An event is not what was written, or is missing."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"the event with seq {seq} is damaged or missing")
        self.seq = seq


def origin(conversation: str, epoch: str) -> bytes:
    """Return what the first event is chained to; `epoch` is the conversation's first."""
    return blake2b(f"{conversation}\0{epoch}".encode(), digest_size=CHAIN_BYTES).digest()


def link(previous: bytes, seq: int, body: bytes) -> bytes:
    """Return what proves an event and all before it."""
    return blake2b(previous + seq.to_bytes(8) + body, digest_size=CHAIN_BYTES).digest()


def sum_of(*fields: Any) -> bytes:
    """Return what proves the fields of a row."""
    return blake2b(msgspec.msgpack.encode(fields), digest_size=SUM_BYTES).digest()
