"""JSON of a provider that may be damaged a little: a wrong byte, half of a character. Knows no dialect.

Strict decoders are asked first. What they refuse is read here, because an answer that was paid for is
worth more than its wrong byte. Halves of a character stay in strings until `as_utf8` joins them: the
other half may be in the next piece of the answer.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from agent_sdk.tools import as_utf8

T = TypeVar("T")


def value(data: bytes) -> Any:
    """Return what the JSON says; None when it is none."""
    try:
        return json.loads(
            data.decode(errors="replace"),
            strict=False,
            parse_constant=lambda _: None,
            object_pairs_hook=lambda pairs: {as_utf8(name): member for name, member in pairs},
        )
    except (ValueError, RecursionError):
        return None


def decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    """Return what the JSON says, as the decoder's type; raise the decoder's error when it is none of that."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        try:
            return msgspec.convert(value(data), decoder.type)
        except (msgspec.ValidationError, UnicodeError):
            raise exc from None


def encode(something: Any) -> bytes:
    """Return JSON of a value in which there may be halves of characters."""
    try:
        return msgspec.json.encode(something)
    except UnicodeEncodeError:
        return msgspec.json.encode(json.loads(as_utf8(json.dumps(something, ensure_ascii=False))))
