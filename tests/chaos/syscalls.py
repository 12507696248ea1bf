"""System calls of a running server that fail, or kill it, with strace."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.chaos.server import Server


def inject(calls: str, what: str) -> list[str]:
    """A command that makes system calls fail, or whatever else strace can do to them; what to trace comes after it."""
    return ["strace", "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:{what}"]


@asynccontextmanager
async def attached(server: Server, calls: str, what: str) -> AsyncIterator[None]:
    """Do something to system calls of a server for the length of the block."""
    process = await asyncio.create_subprocess_exec(
        *inject(calls, what), "-p", str(server.pid), stderr=asyncio.subprocess.PIPE
    )
    try:
        while b"attached" not in (line := await process.stderr.readline()):
            assert line, "strace did not attach"
        yield
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.communicate()
