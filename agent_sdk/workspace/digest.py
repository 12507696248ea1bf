"""SHA-256, of files that move and of calls that may come again, loaded when the first one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from hashlib import _Hash


def sha256() -> _Hash:
    """Return a fresh SHA-256."""
    import hashlib  # noqa: PLC0415  it loads OpenSSL, 3.6 MB that a box without transfers does not need

    return hashlib.sha256()


def digest_of(*params: Any) -> bytes:
    """Return the SHA-256 of values that JSON can say: the same for the same values."""
    digest = sha256()
    digest.update(msgspec.json.encode(params, order="sorted"))
    return digest.digest()
