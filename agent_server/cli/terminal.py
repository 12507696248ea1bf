"""Standard input, output and error, read and written without a thread and without ever holding up the loop.

Text for people: control characters made visible, colours only where they are wanted. A pager that waits, a terminal
that is held (^S) or a full pipe would otherwise stop heartbeats, and the server would hang up on us.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from agent_sdk.protocol.errors import visible, visible_json

STDIN, STDOUT, STDERR = 0, 1, 2
PIECE_BYTES = 64 << 10
ALWAYS_FITS = select.PIPE_BUF
"""A pipe that is ready takes this many bytes without waiting."""

Style = Literal["", "bold", "dim", "red", "green", "yellow", "cyan"]
Paint = Callable[[str, Style], str]
Row = tuple[tuple[str, ...], Style]
"""Cells of a table, and how they look."""


def json_line(text: bytes) -> bytes:
    """Return JSON as a line for programs, which a terminal may show as well."""
    return visible_json(text) + b"\n"


async def print_json(values: Iterable[object]) -> None:
    """Write values to standard output, one JSON object per line."""
    await Outlet(STDOUT).write(b"".join(json_line(msgspec.json.encode(value)) for value in values))


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

    async def table(self, head: tuple[str, ...], rows: Sequence[Row]) -> None:
        """Write rows in columns that are as wide as they need to be."""
        lines: list[Row] = [(head, "bold"), *rows]
        widths = [max(map(len, column)) for column in zip(*(cells for cells, _ in lines), strict=True)]
        for cells, style in lines:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            await self.line("  ".join(padded).rstrip(), style)


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


class Inlet:
    """One descriptor to read from."""

    def __init__(self, descriptor: int = STDIN) -> None:
        self._descriptor = descriptor

    async def read(self) -> bytes:
        """Return the next bytes, at most 64 KiB; nothing at the end. Cancelling loses nothing.

        Raises:
            OSError: it cannot be read, e.g. because it is closed.
        """
        await self._ready()
        return os.read(self._descriptor, PIECE_BYTES)

    async def read_all(self) -> bytes:
        """Return everything up to the end."""
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)

    async def _ready(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except PermissionError:
            return  # a regular file or /dev/null: never a reason to wait
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)


class Outlet:
    """One descriptor to write to. Pieces arrive whole and in the order of the calls."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._turn = asyncio.Lock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def columns(self) -> int | None:
        """Return the width of the terminal that it is; None when it is none."""
        try:
            return os.get_terminal_size(self.descriptor).columns or None
        except OSError:
            return None

    async def write(self, data: bytes) -> None:
        """Write all of it; cancelling leaves the rest unwritten.

        Raises:
            BrokenPipeError: nobody reads any more.
            OSError: the disk is full, …
        """
        async with self._turn:
            view = memoryview(data)
            while view:
                if not self._poll.poll(0):
                    await self._room()
                view = view[os.write(self.descriptor, view[:ALWAYS_FITS]) :]

    async def _room(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self.descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self.descriptor)
