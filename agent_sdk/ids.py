"""Names of what is made here, UUIDs of version 7 (RFC 9562), which sort by time; and of bytes, their SHA-256."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any

from agent_sdk.protocol.errors import InvalidParams

if TYPE_CHECKING:
    from hashlib import _Hash

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


def new_id() -> str:
    """Return a fresh UUIDv7 as lower-case text: 48 bits of Unix milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (2**48 - 1)) << 80 | 7 << 76 | (random >> 68) << 64
    value |= 2 << 62 | random & (2**62 - 1)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_id(text: str) -> bool:
    """Return whether it is a UUID in lower case."""
    return _UUID.match(text) is not None


def checked_op_id(op_id: str) -> str:
    """Return the op_id that a caller has chosen for a call.

    Raises:
        InvalidParams: it is no UUID in lower case.
    """
    if not isinstance(op_id, str) or not is_id(op_id):
        got = repr(op_id)
        raise InvalidParams(
            f"op_id: expected a UUID as lower-case text, like str(uuid.uuid4()), got {got[:64]}"
        )
    return op_id


def checked_new_conversation(id: str | None) -> str | None:
    """Return the id that a conversation is to be made under on a server.

    Raises:
        InvalidParams: it is no UUID in lower case.
    """
    if id is not None and not _UUID.match(id):
        raise InvalidParams(
            f"id: there is no conversation {id[:64]!r} on the server, and a new one there is called by a UUID as "
            "lower-case text, like str(uuid.uuid4())",
            field="id",
        )
    return id


def op_id_or_new(op_id: str | None) -> str:
    """Return the op_id that a caller has chosen, checked, or a fresh one."""
    return new_id() if op_id is None else checked_op_id(op_id)


def sha256() -> _Hash:
    """Return a fresh SHA-256."""
    import hashlib  # noqa: PLC0415  it loads OpenSSL, 3.6 MB that a box without transfers does not need

    return hashlib.sha256()


def digest_of(*params: Any) -> bytes:
    """Return the SHA-256 of values that JSON can say: the same for the same values."""
    import msgspec  # noqa: PLC0415  an id needs none

    digest = sha256()
    digest.update(msgspec.json.encode(params, order="sorted"))
    return digest.digest()
