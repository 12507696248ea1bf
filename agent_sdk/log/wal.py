"""What the WAL file of a log tells before SQLite opens it: whether commits in it can no longer be read.

SQLite takes the frames up to the first one whose checksum is wrong and forgets the rest without a word.
That is right for a commit that was being written when the power went: nobody heard of it. But a commit
begins only when the one before it is on the disk. So when a whole commit follows a broken one, what
has been acknowledged is gone. Damage to the very last commit cannot be told from one that was cut short.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24

_MAGIC = {0x377F0682: "<II", 0x377F0683: ">II"}
_MASK = 0xFFFFFFFF
_INDEX_VERSION = 3007000


class Frame(NamedTuple):
    """A page as it lies in the WAL."""

    commits: bool
    current: bool
    """It belongs to what was written since the WAL began anew."""
    sums: tuple[int, int]
    content: bytes
    """What its checksum is over."""


def frames_read(database: Path) -> int:
    """Return up to which frame SQLite reads the WAL of a database that it has just been opened; 0: it does not tell.

    It stands in the index of the WAL, which SQLite makes anew with the first connection (sqlite.org/walformat.html).
    """
    try:
        with database.with_name(f"{database.name}-shm").open("rb") as file:
            version, _, _, ready, frames = struct.unpack("=IIIB3xI", file.read(20))
    except (OSError, struct.error):
        return 0
    return int(frames) if version == _INDEX_VERSION and ready else 0


def commits_lost(path: Path, read: int = 0) -> bool:
    """Return whether commits in this WAL were acknowledged and cannot be read.

    Args:
        path: of the WAL.
        read: up to which frame SQLite reads it: only what comes behind is looked at, because its own checksums
            are a hundred times as fast as ours.
    """
    try:
        with path.open("rb") as file:
            data = file.read()
    except OSError:  # it is not there; or SQLite will say what is wrong with it
        return False
    if len(data) <= HEADER_BYTES + FRAME_HEADER_BYTES or not any(data[:HEADER_BYTES]):
        return False
    magic, _, page_size, _, *salts_and_sums = struct.unpack(">8I", data[:HEADER_BYTES])
    order = _MAGIC.get(magic)
    if order is None or _checksum(data[:24], (0, 0), order) != tuple(salts_and_sums[2:]):
        return True
    sums = tuple(salts_and_sums[2:])
    first = HEADER_BYTES + read * (FRAME_HEADER_BYTES + page_size)
    if first > len(data):
        first = HEADER_BYTES
    if first > HEADER_BYTES:
        last = first - FRAME_HEADER_BYTES - page_size
        sums = struct.unpack(">2I", data[last + 16 : last + FRAME_HEADER_BYTES])
    return _lost(_frames(data, page_size, tuple(salts_and_sums[:2]), first), sums, order)


def _lost(frames: Iterator[Frame], sums: tuple[int, ...], order: str) -> bool:
    unknown_end = False
    broken = False
    for frame in frames:
        whole = frame.current and _checksum(frame.content, sums, order) == frame.sums
        if not whole and not broken:
            # The commit that it belongs to may end with it, or with the next whole one that ends a commit.
            broken, unknown_end = True, not frame.commits
        elif broken and whole and frame.commits:
            if not unknown_end:
                return True
            unknown_end = False
        sums = frame.sums
    return False


def _frames(data: bytes, page_size: int, salts: tuple[int, ...], first: int) -> Iterator[Frame]:
    size = FRAME_HEADER_BYTES + page_size
    for start in range(first, len(data) - size + 1, size):
        header = struct.unpack(">6I", data[start : start + FRAME_HEADER_BYTES])
        content = data[start : start + 8] + data[start + FRAME_HEADER_BYTES : start + size]
        yield Frame(header[1] != 0, header[2:4] == salts, header[4:6], content)


def _checksum(data: bytes, start: tuple[int, ...], order: str) -> tuple[int, int]:
    first, second = start
    for one, other in struct.iter_unpack(order, data):
        first = first + one + second & _MASK
        second = second + other + first & _MASK
    return first, second
