"""What commands and shells have said: all of it, or how it begins and ends."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

OutputName = Literal["stdout", "stderr"]

HEAD_BYTES = 64 << 10
TAIL_BYTES = 1 << 20
SPOOL_BYTES = 256 << 20


class Output(Struct, frozen=True):
    """What one stream of a process said: all of it, or its first 64 KiB and its last 1 MiB."""

    head: bytes = b""
    tail: bytes = b""
    """Empty when `head` is everything."""
    size: int = 0
    """Bytes written in all, exactly."""

    @property
    def omitted(self) -> int:
        """Bytes between head and tail that are not here; `Process.output` may still have them."""
        return self.size - len(self.head) - len(self.tail)

    @property
    def text(self) -> str:
        """UTF-8, wrong bytes replaced; a line says how much was left out in the middle."""
        if not self.omitted:
            return (self.head + self.tail).decode(errors="replace")
        gap = f"\n[... {self.omitted} bytes left out ...]\n"
        return self.head.decode(errors="replace") + gap + self.tail.decode(errors="replace")


class ShellResult(Struct, frozen=True, kw_only=True):
    """What a persistent shell answered."""

    status: Literal["done", "quiet", "timeout", "busy", "ended", "unknown", "said"]
    """`done`: the command ended; `quiet`: it runs but has said nothing for a while; `timeout`: it runs and
    its time is over; `said`: it runs and has said what was waited `until`; `busy`: an earlier command still runs,
    this one was not started; `ended`: the shell itself ended, a fresh one with the same folder and environment is
    ready; `unknown`: its place was lost meanwhile."""
    output: Output = Output()
    """What was printed since the last answer."""
    exit_code: int | None = None
    cwd: str = ""
    full_output: str | None = None
    """Path in the workspace's machine of a file with the output, where it is long."""
    full_output_lacks: int = 0
    """Bytes that even this file lacks in its middle, where a line says so."""
    reason: str = ""
    """What went wrong besides, e.g. `killed: out of memory (limit 512 MiB)`."""
