"""The SHA-256 of files that move, loaded when the first one does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash


def sha256() -> _Hash:
    """Return a fresh SHA-256."""
    import hashlib  # noqa: PLC0415  it loads OpenSSL, 3.6 MB that a box without transfers does not need

    return hashlib.sha256()
