"""From what a program sends to a terminal to what a reader would see there, as plain text.

A program that moves the cursor about (an editor, a monitor, bars that grow together) is followed on a grid of
characters. That knows what such programs use, not all that a terminal can. Rows that left the screen at its top
are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

ROWS = 50
_COLUMNS = 1000
"""How far the cursor can be sent."""
LONGEST = 64 << 10
"""Characters that are looked at in a moment."""

# Positions, moves up, whole screens, lines that are put in or taken out.
_MOVES = re.compile(r"(?:\x1b\[|\x9b)(?:[0-9;]*[HfdAELMST]|[23]J|\?(?:47|1047|1049)[hl])|\x1bM")
_TOKEN = re.compile(
    r"(?P<text>[^\x00-\x1f\x7f-\x9f]+)"
    r"|(?:\x1b\[|\x9b)(?P<parameters>[0-?]*)[ -/]*(?P<final>[@-~])?"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*(?P<escape>[0-~])"
    r"|(?P<control>.)",
    re.DOTALL,
)


def moves_about(text: str) -> bool:
    """Whether this is more than lines one after the other."""
    return _MOVES.search(text) is not None


def rendered(text: str) -> str:
    """Return what is left on the screen, without blanks at the ends of lines and empty lines after one another."""
    grid = _Grid()
    for token in _TOKEN.finditer(text):
        grid.take(token)
    lines = ["".join(row).rstrip() for row in grid.rows]
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept).rstrip()


class _Grid:
    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self._first = 0
        """The row at the top of the screen."""
        self._row = self._column = 0
        self._saved = (0, 0)
        self._region = (0, ROWS - 1)
        self._behind: tuple[list[list[str]], int] = ([], 0)
        """The usual screen, while the other one is shown."""
        self._acts: Mapping[str, Callable[[int], None]] = {
            "A": lambda n: self._move(self._row - n, self._column),
            "B": lambda n: self._move(self._row + n, self._column),
            "e": lambda n: self._move(self._row + n, self._column),
            "C": lambda n: self._move(self._row, self._column + n),
            "D": lambda n: self._move(self._row, self._column - n),
            "E": lambda n: self._move(self._row + n, 0),
            "F": lambda n: self._move(self._row - n, 0),
            "G": lambda n: self._move(self._row, n - 1),
            "`": lambda n: self._move(self._row, n - 1),
            "d": lambda n: self._move(n - 1, self._column),
            "L": lambda n: self._shift(self._row, n),
            "M": lambda n: self._shift(self._row, -n),
            "S": lambda n: self._shift(self._region[0], -n),
            "T": lambda n: self._shift(self._region[0], n),
            "P": lambda n: self._replace(self._column, n, ""),
            "X": lambda n: self._replace(self._column, n, " " * n),
            "@": lambda n: self._replace(self._column, 0, " " * n),
        }

    def take(self, token: re.Match[str]) -> None:
        """Do what the next piece of output asks for."""
        if text := token["text"]:
            self._replace(self._column, len(text), text)
            self._column += len(text)
        elif token["final"]:
            self._sequence(token["parameters"], token["final"])
        elif token["escape"] == "M":
            if self._row == self._region[0]:
                self._shift(self._row, 1)
            else:
                self._move(self._row - 1, self._column)
        elif token["escape"] == "7":
            self._saved = (self._row, self._column)
        elif token["escape"] == "8":
            self._move(*self._saved)
        elif control := token["control"]:
            self._control(control)

    def _control(self, control: str) -> None:
        match control:
            case "\n" if self._row == self._region[1]:
                self._column = 0
                if self._region == (0, ROWS - 1):
                    self._line()
                    self._first += 1
                else:
                    self._shift(self._region[0], -1)
            case "\n":
                self._move(self._row + 1, 0)
            case "\r":
                self._column = 0
            case "\b":
                self._column = max(0, self._column - 1)
            case "\t":
                self._column = (self._column // 8 + 1) * 8

    def _sequence(self, parameters: str, final: str) -> None:
        if parameters.startswith("?"):
            if parameters[1:] in ("47", "1047", "1049") and final in "hl":
                self._switch(other=final == "h")
            return
        numbers = [int(word[:5]) if word.isdigit() else 0 for word in parameters.split(";")]
        first = max(1, min(numbers[0], _COLUMNS))
        match final:
            case "H" | "f":
                self._move(first - 1, max(1, numbers[1] if len(numbers) > 1 else 1) - 1)
            case "J":
                self._erase_screen(numbers[0])
            case "K":
                self._erase_line(numbers[0])
            case "r":
                last = numbers[1] if len(numbers) > 1 and numbers[1] else ROWS
                self._region = (min(first, ROWS) - 1, min(max(last, first + 1), ROWS) - 1)
            case "s":
                self._saved = (self._row, self._column)
            case "u":
                self._move(*self._saved)
            case _ if final in self._acts:
                self._acts[final](first)

    def _switch(self, *, other: bool) -> None:
        if other:
            self._behind, self.rows, self._first = (self.rows, self._first), [], 0
        else:
            (self.rows, self._first), self._behind = self._behind, ([], 0)
        self._region = (0, ROWS - 1)
        self._move(min(len(self.rows) - self._first, ROWS - 1), 0)

    def _move(self, row: int, column: int) -> None:
        self._row, self._column = max(0, min(row, ROWS - 1)), max(0, min(column, _COLUMNS))

    def _line(self, row: int | None = None) -> list[str]:
        at = self._first + (self._row if row is None else row)
        while len(self.rows) <= at:
            self.rows.append([])
        return self.rows[at]

    def _replace(self, column: int, count: int, text: str) -> None:
        line = self._line()
        line.extend(" " * (column - len(line)))
        line[column : column + count] = text

    def _erase_line(self, mode: int) -> None:
        line = self._line()
        if mode == 0:
            del line[self._column :]
        else:
            line[: self._column + 1 if mode == 1 else None] = " " * (self._column + 1 if mode == 1 else 0)

    def _erase_screen(self, mode: int) -> None:
        for row in range(len(self.rows) - self._first):
            if mode >= 2 or (mode == 0 and row > self._row) or (mode == 1 and row < self._row):
                self._line(row).clear()
        if mode < 2:
            self._erase_line(mode)

    def _shift(self, row: int, count: int) -> None:
        """Move the rows from this one to the end of the region down, or up where the number is negative."""
        last = self._region[1]
        self._line(last)
        for _ in range(min(abs(count), ROWS)):
            if count > 0:
                del self.rows[self._first + last]
                self.rows.insert(self._first + row, [])
            else:
                self.rows.insert(self._first + last + 1, [])
                del self.rows[self._first + row]


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
