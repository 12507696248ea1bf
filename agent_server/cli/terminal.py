"""Text for people: control characters made visible, colours only where they are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from agent_sdk.protocol.visible import visible, visible_json
from agent_server.cli.stdio import Outlet

STDOUT, STDERR = 1, 2
__all__ = ["STDERR", "STDOUT", "Style", "Terminal", "json_line", "one_line", "open_terminal", "visible"]

Style = Literal["", "bold", "dim", "red", "green", "yellow", "cyan"]
Paint = Callable[[str, Style], str]


def json_line(text: bytes) -> bytes:
    """Return JSON as a line for programs, which a terminal may show as well."""
    return visible_json(text) + b"\n"


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
