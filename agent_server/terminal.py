"""Text for people: control characters made visible, colours only where they are wanted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Literal

from agent_server.outlet import Outlet

STDOUT, STDERR = 1, 2

Style = Literal["", "bold", "dim", "red", "green", "yellow", "cyan"]
Paint = Callable[[str, Style], str]

# C0 but tab and newline, DEL, C1, and what reorders or hides text: output of commands must not drive the terminal.
_TRICKS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return the text with control characters escaped; tabs and newlines stay, CR LF becomes a newline."""
    return _TRICKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return the text as one line, whatever is in it."""
    return " ".join(visible(text).split())


class Terminal:
    """Where people read."""

    def __init__(self, outlet: Outlet, *, live: bool = False, paint: Paint | None = None) -> None:
        self._outlet = outlet
        self._paint = paint
        self.live = live
        """Whether somebody watches, so that answers are shown while they are written."""
        self.width = outlet.columns()
        """Characters in a line; None: as many as one likes."""

    async def write(self, text: str, style: Style = "") -> None:
        """Write text; what is not ours must be made `visible` before."""
        painted = self._paint(text, style) if self._paint and style and text.strip() else text
        await self._outlet.write(painted.encode("utf-8", "backslashreplace"))

    async def line(self, text: str = "", style: Style = "") -> None:
        """Write a line."""
        await self.write(text, style)
        await self.write("\n")


def open_terminal(descriptor: int = STDOUT) -> Terminal:
    """Return the terminal behind a descriptor: with colours when it is one and `rich` is installed."""
    live = os.isatty(descriptor)
    return Terminal(Outlet(descriptor), live=live, paint=_painter() if live else None)


def _painter() -> Paint | None:
    try:
        # An extra, and 0.1 s to import: only where there is somebody to see it.
        from rich.color import ColorSystem  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415
        from rich.style import Style as RichStyle  # noqa: PLC0415
    except ImportError:
        return None
    console = Console()
    if console.color_system is None or console.no_color:
        return None

    def paint(text: str, style: Style) -> str:
        return RichStyle.parse(style).render(text, color_system=ColorSystem.STANDARD)

    return paint
