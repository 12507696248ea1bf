"""From what a program sends to a terminal to what a reader would see there, as plain text."""

from __future__ import annotations

import re

from agent_sdk.agent.tools.grid import LONGEST, moves_about, rendered

# Escape sequences of ECMA-48, also those that break off. A string sequence (title, hyperlink) ends with BEL or ESC \;
# it is matched up to the next ESC only, so that a hostile flood of beginnings costs linear time.
_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]?"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]?"
)
_INVISIBLE = re.compile(r"[\x00-\x07\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """Return the text without escape sequences and control characters; of a progress bar its last state.

    Where a program has moved the cursor about, it is what is left on the screen.
    """
    if moves_about(text[-LONGEST:]):
        return _lines(text[:-LONGEST]) + rendered(text[-LONGEST:])
    return _lines(text)


def _lines(text: str) -> str:
    if "\x1b" in text or "\x9b" in text:
        text = _SEQUENCE.sub("", text)
    text = text.replace("\r\n", "\n")
    if "\r" in text:
        text = "\n".join(_last_state(line) if "\r" in line else line for line in text.split("\n"))
    if "\b" in text:
        text = _without_backspaces(text)
    return _INVISIBLE.sub("", text)


def _last_state(line: str) -> str:
    """What stays of a line that was written over and over, each time from its beginning."""
    states = [state for state in line.split("\r") if state]
    return states[-1] if states else ""


def _without_backspaces(text: str) -> str:
    kept: list[str] = []
    for character in text:
        if character != "\b":
            kept.append(character)
        elif kept and kept[-1] != "\n":
            kept.pop()
    return "".join(kept)
