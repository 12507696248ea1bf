"""What a JSON parser lets pass and the accepting side of a connection does not: nesting, repeated keys.

Both questions are asked cheaply first (counting bytes), exactly only when the cheap answer is not
enough. No check builds Python objects out of what it looks at.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from agent_sdk.protocol.errors import MaxDepth

# Possessive quantifiers: no backtracking, so neither time nor memory grows beyond the input.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_INNERMOST = re.compile(rb"\[:*+\]")
_ALIKE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))
_MEMBERS = (b'"jsonrpc"', b'"id"', b'"method"', b'"params"', b'"result"', b'"error"')

_members = msgspec.json.Decoder(dict[str, Raw])


def check_depth(text: bytes | bytearray, limit: int) -> None:
    """Refuse JSON that is nested more than `limit` levels deep.

    Raises:
        MaxDepth: it is.
    """
    if text.count(b"[") + text.count(b"{") <= limit:
        return
    brackets = _STRING.sub(b"", text).translate(_ALIKE, _NOT_BRACKETS)
    too_many = b"[" * (limit + 1)
    for _ in range(limit):
        if b"[]" not in brackets or too_many in brackets:
            break
        brackets = brackets.replace(b"[]", b"")  # takes one level, everywhere
    if b"[" in brackets:
        raise MaxDepth(f"max_depth {limit}", limit=limit)


def repeats_a_member(text: bytes | bytearray) -> bool:
    """Whether a key of this valid JSON object occurs twice at its top level, however it is spelt."""
    if b"\\u" not in text and all(text.count(member) <= 1 for member in _MEMBERS):
        return False
    structure = _STRING.sub(b"", text).translate(_ALIKE, _NOT_STRUCTURE)
    while structure.count(b"[") > 1:
        structure = _INNERMOST.sub(b"", structure)
    return structure.count(b":") != len(_members.decode(text))
