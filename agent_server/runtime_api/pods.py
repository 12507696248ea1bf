"""Where the runtimes of the Runtime API run: what a pod promises, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from msgspec import Struct


class PodSpec(Struct, frozen=True, kw_only=True):
    """What a pod is asked for."""

    runtime_id: str
    api_key: str
    """What its clients need."""
    image: str
    environment: Mapping[str, str]
    """For the server in it, and in our own images for the commands, too."""
    cpus: float
    memory: int
    """Bytes."""
    disk: int | None = None
    """Bytes that its data may take, where that can be limited; None: no limit."""
    runtime_class: str | None
    image_pull_policy: str
    command: str | list[str] | None = None
    """What is run instead of what the image says: a server of somebody else; a text is split as a shell does it."""
    working_dir: str | None = None
    """Of that command."""
    run_as_user: int | None = None
    """Its user; in our own images, without a command, the one of the commands."""
    fs_group: int | None = None
    """A further group of that command, which may write its data. In our own images the data is the server's alone."""
    folder: Path
    """On this machine, its own."""

    def __repr__(self) -> str:
        return f"PodSpec({self.runtime_id})"


class Pod(Protocol):
    """An agent server in a place of its own. It goes on without us; whoever comes next finds it by its spec."""

    @property
    def url(self) -> str:
        """Where the server listens; valid once it was started."""
        ...

    async def start(self, seconds: float) -> None:
        """Make it run and wait until it is ready, whatever it was: new, paused, ended, or running already.

        Whatever raises, or a cancel, leaves nothing that runs; its data stays.

        Args:
            seconds: how long that may take.

        Raises:
            WorkspaceUnavailable: it does not run; with phase, cause and what to do.
        """
        ...

    async def died(self) -> str:
        """Wait until it has ended by itself; returns why, in a few words. Cancelling ends the waiting only."""
        ...

    async def pause(self) -> None:
        """Let nothing in it run until `start`; its data stays."""
        ...

    async def end(self) -> None:
        """End it and remove all of it, but for its folder. May be called again, also of one that never started."""
        ...

    async def let_go(self) -> None:
        """Leave it to itself."""
        ...

    async def last_words(self) -> str:
        """Return the last lines of its log."""
        ...


class Pods(Protocol):
    """Makes pods of one kind."""

    @property
    def paused_keeps_memory(self) -> bool:
        """Whether a paused one has its memory still."""
        ...

    def pod(self, spec: PodSpec) -> Pod:
        """Describe one; nothing happens before it is started, or ended."""
        ...

    def disk(self, wanted: int | None) -> int | None:
        """Return the limit that the data of a pod has when this one is asked for; None: none."""
        ...

    async def sweep(self, known: Callable[[], Collection[str]]) -> None:
        """End and remove everything of ours that belongs to none of these runtimes.

        Args:
            known: their ids; asked in a thread, after it was looked what there is.
        """
        ...
