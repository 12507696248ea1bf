"""What a call that changes a conversation is remembered by, so that it gets the same answer when it comes once more."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from agent_sdk.conversation.journal import Journal
from agent_sdk.idempotency import asked
from agent_sdk.ids import digest_of
from agent_sdk.log.event_log import Operation
from agent_sdk.protocol.errors import InvalidParams, OpMismatch
from agent_sdk.protocol.methods.method import Effect
from agent_sdk.protocol.results import Accepted

T = TypeVar("T")


def check_text(text: str) -> None:
    """Accept the text of a message.

    Raises:
        InvalidParams: the text is empty or cannot be UTF-8.
    """
    if not text.strip():
        raise InvalidParams("text: a message needs at least one character that is not white space")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        half = f"character {exc.start} is half of a surrogate pair, which UTF-8 cannot say"
        raise InvalidParams(f"text: {half}") from None


def operation(params: Effect[Any]) -> Operation:
    """Return the log's row for a call; its result comes later.

    What is secret leaves no trace, not even a digest that could be guessed at.
    """
    fields = asked(params)
    if "secrets" in fields:
        fields["secrets"] = sorted(fields["secrets"])
    llm = fields.get("llm") or fields.get("agent", {}).get("llm", {})
    for name in ("api_key", "headers"):
        llm.pop(name, None)
    return Operation(params.op_id, digest_of(params.method, fields), b"null")


def answering(op: Operation | None, result: Any) -> Operation | None:
    """Return the row with what the call answers."""
    return None if op is None else replace(op, result=msgspec.json.encode(result))


def receipt(op: Operation | None, run_id: str) -> Operation | None:
    """Return the row of a message; its receipt is made when the message has its seq."""
    if op is None:
        return None
    return replace(op, result=lambda events: msgspec.json.encode(Accepted(events[0].seq, run_id)))


async def remembered(journal: Journal, op: Operation | None, result: type[T]) -> T | None:
    """Return what this call answered before; None when it did not come before.

    Raises:
        OpMismatch: another call came with this op_id.
        OpExpired: it is too long ago.
    """
    known = op and await journal.log.operation(journal.conversation, op.op_id)
    if op is None or known is None:
        return None
    if known.digest != op.digest:
        raise OpMismatch("this op_id was used for another call", op_id=op.op_id)
    assert isinstance(known.result, bytes)
    return msgspec.json.decode(known.result, type=result)
