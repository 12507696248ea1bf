"""Which of an engine's runtimes a sandbox can have."""

from __future__ import annotations

from collections.abc import Iterable

from agent_sdk.protocol.errors import IsolationUnavailable
from workspaces.backend.docker.engine_info import EngineInfo

GVISOR = "runsc"
REACHED_BY = ({"--host-uds=all", "--host-uds=create"}, {"--host-fifo=open"})
"""What gVisor needs to be told, so that the box can listen in a folder of this machine."""


def usable_runtime(info: EngineInfo, wanted: str) -> str:
    """Return the runtime that was asked for; never another one.

    Raises:
        IsolationUnavailable: the engine has none of this name, or nothing could reach a sandbox in it.
    """
    if wanted not in info.runtimes:
        raise IsolationUnavailable(
            f"the engine has no runtime {wanted}; install it and name it in the engine's daemon.json, "
            f"or ask for one of: {', '.join(sorted(info.runtimes))}",
            wanted=wanted,
        )
    if wanted == GVISOR and not reaches_sandboxes(info.runtimes[wanted]):
        raise IsolationUnavailable(
            f"the engine's runtime {wanted} lets nothing reach a sandbox; give it the arguments "
            "--host-uds=all and --host-fifo=open in the engine's daemon.json",
            wanted=wanted,
        )
    return wanted


def reaches_sandboxes(arguments: Iterable[str]) -> bool:
    """Whether gVisor, started with these arguments, lets the box listen in a folder of this machine."""
    return all(not either.isdisjoint(arguments) for either in REACHED_BY)
