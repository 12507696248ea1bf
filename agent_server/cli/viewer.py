"""Events on standard output while they happen: for people, or one JSON object per line for programs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from agent_sdk.conversation.contract import Conversation
from agent_sdk.protocol.events import Delta, Event, encode
from agent_server.cli.stdio import Outlet
from agent_server.cli.terminal import STDERR, STDOUT, Terminal, json_line, one_line, open_terminal
from agent_server.cli.transcript import CHARACTERS_SHOWN, Piece, Transcript

T = TypeVar("T")


class Viewer:
    """Shows events. Its methods are callbacks, so they keep a failure to write for `watch`, which raises it."""

    def __init__(self, terminal: Terminal | None, lines: Outlet) -> None:
        self._terminal = terminal
        self._lines = lines
        self._transcript = Transcript((terminal and terminal.width) or CHARACTERS_SHOWN)
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def event(self, event: Event) -> None:
        """Show an event."""
        if self._terminal is None:
            await self._try(self._lines.write(json_line(encode(event))))
        else:
            await self._try(self._write(self._transcript.event(event)))

    async def delta(self, delta: Delta) -> None:
        """Show a piece of an answer that is being written, where somebody watches."""
        if self._terminal is not None and self._terminal.live:
            await self._try(self._write(self._transcript.delta(delta)))

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the work; when output cannot be written any more, cancel the work.

        Raises:
            BrokenPipeError: nobody reads any more.
            OSError: output could not be written.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._broken}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _write(self, pieces: list[Piece]) -> None:
        if self._terminal is not None:
            for piece in pieces:
                await self._terminal.write(piece.text, piece.style)

    async def _try(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            await writing
        except OSError as exc:
            if not self._broken.done():
                self._broken.set_exception(exc)


async def tell_waits(conversation: Conversation) -> None:
    """Say on standard error what the conversation waits for, if anything."""
    if waiting_for := (await conversation.state()).waiting_for:
        await open_terminal(STDERR).line(f"agent-server: it waits for {one_line(waiting_for)}")


def open_viewer(*, json: bool) -> Viewer:
    """Return a viewer on standard output."""
    return Viewer(None if json else open_terminal(), Outlet(STDOUT))
