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
# Every escape in turn, so that an escaped backslash before a `u` is not taken for one; a pair counts as one.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
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


def without_lone_surrogates(text: bytes | bytearray) -> bytes:
    """The JSON with U+FFFD for escapes that are half of a pair, which no UTF-8 text can hold."""
    return _ESCAPE.sub(lambda found: b"\\ufffd" if found["lone"] else found[0], text)


def repeats_a_member(text: bytes | bytearray) -> bool:
    """Whether a key of this valid JSON object occurs twice at its top level, however it is spelt."""
    if b"\\u" not in text and max(map(text.count, _MEMBERS)) <= 1:
        return False
    structure = _STRING.sub(b"", text).translate(_ALIKE, _NOT_STRUCTURE)
    while structure.count(b"[") > 1:
        structure = _INNERMOST.sub(b"", structure)
    return structure.count(b":") != len(_members.decode(text))
