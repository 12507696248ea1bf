"""What every way to run a box promises to whoever keeps it: a process, a process confined, a container."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from agent_sdk.protocol.results import WorkspaceInfo


class Box(Protocol):
    """One box: not started, or found again after whoever started it is gone.

    It goes on without us when we are let go of, or killed, for as long as it lingers. Whoever looks through
    the folder of its owner later finds it, or what is left of it.
    """

    instance: str
    """Its name; chosen before it starts, and the same for everybody who finds it."""

    @property
    def url(self) -> str:
        """Where it listens, as `connect` takes it; valid once it has started."""
        ...

    @property
    def token(self) -> str:
        """What connections to it have to show, so that its own commands are no company to it; kept on record."""
        ...

    @property
    def ended(self) -> asyncio.Future[int | None]:
        """Done when it has ended by itself or was ended, with its exit code where that is known."""
        ...

    @property
    def cause(self) -> str:
        """Why it ended, in one word, as WorkspaceChanged has it; empty when nothing is known."""
        ...

    async def start(self) -> None:
        """Start it and wait until it can be connected to. Whatever raises, or a cancel, leaves nothing of it.

        Raises:
            PathNotFound, WorkspaceUnavailable: it did not start; with phase, cause and what to do.
        """
        ...

    async def end(self) -> None:
        """End it with everything that runs in it and remove what belongs to it, but for the workspace itself.

        May be called again, also of one that never started. Cancelling does not stop it.
        """
        ...

    def kill(self) -> None:
        """End the box at once, because it does not answer; `end` cleans up after it. Does not wait."""
        ...

    def let_go(self) -> None:
        """Leave it to itself: it can be found again."""
        ...

    def last_words(self) -> str:
        """Why it ended and the end of what it said, as one line; empty when nothing is known."""
        ...

    async def freeze(self) -> None:
        """Let nothing in it run until `thaw`.

        Raises:
            IsolationUnavailable: it is of a kind that cannot.
            NotFound, WorkspaceUnavailable: it has ended.
        """
        ...

    async def thaw(self) -> None:
        """Let it go on; nothing happens to one that is not frozen, or never can be."""
        return

    def follow(self, listener: Callable[[bool], None]) -> None:
        """Call this with whether it is frozen, whenever somebody has frozen it or let it go on."""
        return

    async def completed(self, info: WorkspaceInfo) -> WorkspaceInfo:
        """Return what it says of itself with what only its keeper knows: image, runtime, usage."""
        ...
