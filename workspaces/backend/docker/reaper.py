"""A small process that removes the containers of a client that died.

`python -m workspaces.backend.docker.reaper INSTANCE [ENGINE]` waits on its standard input, which
is a pipe from the client. The kernel closes that pipe however the client ends. An end without a
farewell means that nobody else cleans up: everything with the label of that instance is removed
then, also from an engine that restarts meanwhile. It is in a session of its own, so Ctrl-C does not reach it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine

FAREWELL = b"farewell\n"
PATIENCE_SECONDS = 600.0
"""For so long an engine that does not answer is tried again."""
LATE_SECONDS = 25.0
"""For so long a container is waited for that the client asked for just before it died. One that comes still later
whoever starts the next container on this machine removes."""


class Reaper:
    """The client's end. Entering starts the process, leaving ends it; it acts when `dismiss` was not called."""

    def __init__(self, instance: str, engine: str | None = None) -> None:
        """Take the label's value, and the engine's address; None: the one that the environment names."""
        self._arguments = [instance] if engine is None else [instance, engine]
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        self._process = self._spawn()
        return self

    async def __aexit__(self, *exc: object) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.returncode = 0  # it may outlive us: Popen has nothing to wait for

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "workspaces.backend.docker.reaper", *self._arguments],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def dismiss(self) -> None:
        """Tell it that there is nothing to do, and wait until it has ended."""
        from agent_sdk.workspace.disk import in_thread  # noqa: PLC0415  the process itself stays small

        process, self._process = self._process, None
        if process is not None:
            await in_thread(process.communicate, FAREWELL)


def main(arguments: list[str]) -> int:
    """Wait for the client's end, then remove its container; returns the exit code."""
    if sys.stdin.buffer.read() == FAREWELL:
        return 0
    import asyncio  # noqa: PLC0415  costs what most of these processes never need

    asyncio.run(reap(*arguments))
    return 0


async def reap(instance: str, engine: str | None = None) -> None:
    """Remove every container of an instance, trying again for 10 min while the engine does not answer."""
    import tenacity  # noqa: PLC0415

    from agent_sdk.protocol.errors import AgentServerError  # noqa: PLC0415
    from workspaces.backend.docker.engine import Engine  # noqa: PLC0415

    retried = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(AgentServerError),
        wait=tenacity.wait_exponential(multiplier=0.5, max=5),
        stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
        reraise=True,
    )
    # One that was asked for and is not there yet comes late; when one was there, there will be no other.
    late = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_result(lambda count: count == 0),
        wait=tenacity.wait_exponential(multiplier=1, max=10),
        stop=tenacity.stop_after_delay(LATE_SECONDS),
        retry_error_callback=lambda _: 0,
    )

    async def once() -> int:
        async with Engine(engine) as opened:
            return await remove_all(opened, instance)

    await late(retried, once)


async def remove_all(engine: Engine, instance: str) -> int:
    """Remove the containers with the label of this instance, and return how many there were.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    from workspaces.backend.labels import INSTANCE  # noqa: PLC0415

    found = await engine.containers({INSTANCE: instance})
    for container in found:
        await engine.remove(container["Id"])
    return len(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
