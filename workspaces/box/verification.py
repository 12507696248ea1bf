"""Whether a sandbox is what was asked for: by the engine's account of it, and by what its box finds from inside.

And why it is no more, by the engine's account.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from agent_sdk.protocol.results import Profile
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.users import HIGHEST
from workspaces.backend.docker.mounts import Source
from workspaces.backend.docker.profiles import KERNEL, UID
from workspaces.box.folder import READY

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Death

TASKS = 1 << 5 | 1 << 6 | 1 << 7
"""What the box of a task keeps, and its commands do not: KILL, SETGID, SETUID."""
FILTERED = 2
"""Of a process whose system calls are filtered, as /proc/self/status has it."""
_FROM_THE_ENGINE = (
    "/",
    "/etc/resolv.conf",
    "/etc/hostname",
    "/etc/hosts",
)
KILLED = {128 + 9: "SIGKILL", 128 + 15: "SIGTERM"}
OWN_KERNEL = frozenset({"runsc"})
"""Runtimes with a kernel of their own, which says other things of itself."""


def engine_differences(body: Mapping[str, Any], inspected: Mapping[str, Any]) -> list[str]:
    """Return what the engine made of a request in another way than asked, one phrase each."""
    sent = {name: value for name, value in body.items() if name != "HostConfig"}
    got = inspected.get("Config") or {}
    return [
        *_compare("", sent, got),
        *_compare("HostConfig.", body["HostConfig"], inspected.get("HostConfig") or {}),
    ]


def _compare(where: str, sent: Mapping[str, Any], got: Mapping[str, Any]) -> Iterator[str]:
    for name, wanted in sent.items():
        if not _same(wanted, got.get(name)) and not _is_harmless(name, wanted, got.get(name)):
            yield f"{where}{name}: {got.get(name)!r:.200} instead of {wanted!r:.200}"


def _same(sent: Any, got: Any) -> bool:
    """Whether they mean the same; engines write an empty value as null, or leave it out."""
    if not sent and not got:
        return True
    if isinstance(sent, dict) and isinstance(got, dict):
        return all(_same(sent.get(name), got.get(name)) for name in {*sent, *got})
    if isinstance(sent, list) and isinstance(got, list):
        return len(sent) == len(got) and all(map(_same, sent, got))
    return bool(sent == got)


def _is_harmless(name: str, sent: Any, got: Any) -> bool:
    """What an image adds, where that has no effect; a kernel without accounting of swap limits the memory, too."""
    if name in ("Labels", "Healthcheck"):
        return isinstance(got, dict) and sent.items() <= got.items()
    return name == "MemorySwap" and got == -1


def box_differences(body: Mapping[str, Any], profile: Profile | None) -> list[str]:
    """Return what the box finds in force in another way than asked, one phrase each."""
    if profile is None:
        return ["the box does not say what is in force"]
    return list(_differences(body["HostConfig"], profile))


def mount_differences(sources: Iterable[Source], profile: Profile | None) -> list[str]:
    """Return what is mounted of the machine, but is something else than what was allowed, one phrase each."""
    found = {mount.target: (mount.device, mount.inode) for mount in (profile.mounts if profile else ())}
    return [
        f"what is mounted at {source.target} is not what was allowed"
        for source in sources
        if found.get(source.target) != (source.device, source.inode)
    ]


def _differences(asked: Mapping[str, Any], found: Profile) -> Iterator[str]:
    is_task = not asked["ReadonlyRootfs"]
    if not is_task and {found.uid, found.gid, *found.groups} != {UID}:
        yield f"it runs as {found.uid}:{found.gid} with the groups {found.groups}"
    if is_task and max(found.uid, found.gid, *found.groups) > HIGHEST:
        yield f"it runs as {found.uid}:{found.gid} with the groups {found.groups}"
    kept = TASKS if is_task else 0
    for name, value, most in (
        ("effective", found.capabilities, kept),
        ("bound", found.capabilities_bound, 0),
    ):
        if not _is_within(value, most):
            yield f"its {name} capabilities are {value[:32]}"
    if asked["Runtime"] not in OWN_KERNEL:
        if not found.no_new_privileges:
            yield "it may gain privileges"
        if found.seccomp != FILTERED or found.seccomp_filters == 1:  # 0: the kernel does not say
            yield "its system calls are not filtered twice, by the engine and by the box"
        yield from _limits(asked, found)
    if found.read_only_root != asked["ReadonlyRootfs"]:
        yield "its root is read-only" if is_task else "its root is writable"
    if asked["NetworkMode"] == "none" and set(found.interfaces) - {"lo"}:
        yield f"it has the networks {', '.join(found.interfaces)[:200]}"
    yield from _mounts(asked, found)


def _is_within(capabilities: str, most: int) -> bool:
    """Whether capabilities as the kernel writes them are none besides these."""
    try:
        return not int(capabilities or "0", 16) & ~most
    except ValueError:
        return False


def _limits(asked: Mapping[str, Any], found: Profile) -> Iterator[str]:
    limits: Sequence[tuple[str, int | None, int]] = (
        ("pids", found.pids_max, asked["PidsLimit"]),
        ("memory", found.memory_max, asked["Memory"]),
    )
    for name, got, wanted in limits:
        if got is None or got > wanted:
            yield f"its limit of {name} is {got} instead of {wanted}"


def _mounts(asked: Mapping[str, Any], found: Profile) -> Iterator[str]:
    ours = {mount["Target"]: mount for mount in asked["Mounts"]}
    seen = {mount.target: mount for mount in found.mounts}
    for target, mount in ours.items():
        if target not in seen:
            yield f"{target} is not mounted"
        elif mount["ReadOnly"] and "ro" not in seen[target].options:
            yield f"{target} is writable"
    for target in seen:
        known = target in ours or target in asked["Tmpfs"] or target in _FROM_THE_ENGINE
        if (
            not known
            and not target.startswith(tuple(f"{place}/" for place in KERNEL))
            and target not in KERNEL
        ):
            yield f"there is a mount at {target[:200]}"


class Ending(NamedTuple):
    """Why a sandbox ended: a word for programs and a sentence for people."""

    cause: str = "engine"
    """`oom`, `killed`, `exit`, or `engine` where it was removed or lost by the engine."""
    words: str = ""

    @classmethod
    def of(cls, death: Death, spec: Sandbox, said: str) -> Self:
        """Return what a death means; with the end of what the box said, in one line."""
        cause, reason = _reason(death, spec)
        lines = " | ".join(line.strip() for line in said.splitlines() if line.strip() not in ("", READY))
        return cls(cause, f"{reason}: {lines}" if lines else reason)


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
