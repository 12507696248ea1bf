"""The container engine of this machine: whether it is there."""

from __future__ import annotations

import asyncio

import aiodocker
import aiohttp

from agent_sdk.protocol.errors import WorkspaceUnavailable

ANSWER_SECONDS = 5.0


async def engine_version() -> str:
    """Ask the engine that DOCKER_HOST, the Docker context or the usual sockets name for its version.

    Raises:
        WorkspaceUnavailable: there is none, or it does not answer within 5 s; details: phase.
    """
    try:
        docker = aiodocker.Docker()
    except (AssertionError, ValueError):
        # aiodocker asserts that it has found a socket.
        raise WorkspaceUnavailable("there is no Docker socket on this machine", phase="engine") from None
    try:
        async with asyncio.timeout(ANSWER_SECONDS), docker:
            return str((await docker.version())["Version"])
    except aiodocker.DockerError as exc:
        reason = exc.message
    except (aiohttp.ClientError, OSError, TimeoutError, KeyError, ValueError) as exc:
        reason = str(exc) or type(exc).__name__
    raise WorkspaceUnavailable(f"the Docker engine does not answer: {reason}", phase="engine")
