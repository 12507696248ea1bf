"""Names of keys, and what a terminal sends for them."""

from __future__ import annotations

import re

_NAMED = {
    "ENTER": b"\r",
    "TAB": b"\t",
    "ESC": b"\x1b",
    "ESCAPE": b"\x1b",
    "SPACE": b" ",
    "BS": b"\x7f",
    "BSPACE": b"\x7f",
    "BACKSPACE": b"\x7f",
    "UP": b"\x1b[A",
    "DOWN": b"\x1b[B",
    "RIGHT": b"\x1b[C",
    "LEFT": b"\x1b[D",
    "HOME": b"\x1b[H",
    "END": b"\x1b[F",
    "PGUP": b"\x1b[5~",
    "PGDN": b"\x1b[6~",
    "DEL": b"\x1b[3~",
    "DELETE": b"\x1b[3~",
}
_CONTROL = re.compile(r"C-([A-Za-z@\[\\\]^_])\Z")


def keystroke(text: str) -> bytes | None:
    """Return what a terminal sends for a named key (`C-c`, `UP`, `ENTER`, …); None: the text names none."""
    control = _CONTROL.match(text)
    if control:
        return bytes([ord(control[1].upper()) & 0x1F])
    return _NAMED.get(text.upper()) if text in (text.upper(), text.capitalize()) else None
