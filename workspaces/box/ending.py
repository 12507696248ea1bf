"""Why a sandbox ended: a word for programs and a sentence for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from agent_sdk.protocol.specs import Sandbox
from workspaces.box.folder import READY

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Death

KILLED = {128 + 9: "SIGKILL", 128 + 15: "SIGTERM"}


class Ending(NamedTuple):
    """Why a sandbox ended."""

    cause: str = "engine"
    """`oom`, `killed`, `exit`, or `engine` where it was removed or lost by the engine."""
    words: str = ""


def ending_of(death: Death, spec: Sandbox, said: str) -> Ending:
    """Return what a death means; with the end of what the box said, in one line."""
    cause, reason = _reason(death, spec)
    lines = " | ".join(line.strip() for line in said.splitlines() if line.strip() not in ("", READY))
    return Ending(cause, f"{reason}: {lines}" if lines else reason)


def _reason(death: Death, spec: Sandbox) -> tuple[str, str]:
    if death.exit_code is None:
        return "engine", death.reason
    if death.oom:
        return "oom", f"it ran out of memory ({spec.memory})"
    if death.exit_code in KILLED:
        return "killed", f"it was killed ({KILLED[death.exit_code]})"
    if death.exit_code == 0:
        return "exit", "it ended by itself, because nobody was connected to it any more"
    return "exit", death.reason
