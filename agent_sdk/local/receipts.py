"""What the sender of a message gets, and gets again when it sends the same message once more."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from agent_sdk.local.journal import Journal
from agent_sdk.local.log import Operation
from agent_sdk.protocol.errors import InvalidParams, OpMismatch
from agent_sdk.protocol.events import Event
from agent_sdk.protocol.results import Accepted


def digest_of(text: str, mode: str) -> bytes:
    """Return what tells this message from others.

    Raises:
        InvalidParams: the text is empty or cannot be UTF-8.
    """
    if not text.strip():
        raise InvalidParams("text: a message needs at least one character that is not white space")
    try:
        encoded = text.encode()
    except UnicodeEncodeError as exc:
        half = f"character {exc.start} is half of a surrogate pair, which UTF-8 cannot say"
        raise InvalidParams(f"text: {half}") from None
    return hashlib.sha256(encoded + b"\0" + mode.encode()).digest()


def operation(op_id: str, digest: bytes, run_id: str) -> Operation:
    """Return the ledger's row for a message; its receipt is made when the message has its seq."""

    def receipt(events: Sequence[Event]) -> bytes:
        return msgspec.json.encode(Accepted(events[0].seq, run_id))

    return Operation(op_id, digest, receipt)


async def receipt_of(journal: Journal, op_id: str, digest: bytes) -> Accepted | None:
    """Return the receipt that a message with this op_id got; None when there was none.

    Raises:
        OpMismatch: it was another message.
    """
    known = await journal.log.operation(journal.conversation, op_id)
    if known is None:
        return None
    if known.digest != digest:
        raise OpMismatch("this op_id was used for another call", op_id=op_id)
    assert isinstance(known.result, bytes)
    return msgspec.json.decode(known.result, type=Accepted)
