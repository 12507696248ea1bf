"""Text of others where people read it: what drives a terminal, reorders text or hides in it is shown as an escape."""

from __future__ import annotations

import re

# C0 but tab and newline, DEL, C1; soft hyphens, joiners and fillers that show nothing; what reorders text; halves of
# pairs; the tag characters, in which whole sentences hide.
_TRICKS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """Return the text with such characters escaped; tabs and newlines stay, CR LF becomes a newline."""
    return _TRICKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def shown(text: str) -> str:
    """Return the text with such characters escaped, tabs and newlines among them."""
    escaped = _TRICKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return escaped.replace("\t", "\\t").replace("\n", "\\n")


def visible_json(text: bytes) -> bytes:
    """Return the same JSON with such characters as escapes of JSON: it says what it said, to programs."""
    if text.isascii() and b"\x7f" not in text:
        return text
    return _TRICKS.sub(_as_json, text.decode()).encode()


def _as_json(found: re.Match[str]) -> str:
    if found[0] < " ":
        return found[0]  # between the values: inside of them JSON has escaped it already
    units = found[0].encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
