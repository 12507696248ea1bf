"""Whether a sandbox is what was asked for, by what its box finds from inside; and what of this machine is mounted.

Clients may own what they have mounted, and swap a folder for a symlink at any moment. The engine follows that; so
what is allowed is walked to without symlinks, and what the sandbox has got has to be the very same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from agent_sdk.protocol.errors import InvalidParams, PolicyDenied
from agent_sdk.protocol.results import Profile
from agent_sdk.workspace.users import HIGHEST
from workspaces.backend.contract import KERNEL, TEMPORARY, UID, Machine

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
_PASS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
OWN_KERNEL = frozenset({"runsc"})
"""Runtimes with a kernel of their own, which says other things of itself."""


class Source(NamedTuple):
    """Which file or folder is to be at a place of a sandbox."""

    target: str
    device: int
    inode: int


def sources(mounts: Iterable[str], allowed: Iterable[str]) -> tuple[Source, ...]:
    """Return what the mounts of a sandbox are at this moment. Blocks.

    Raises:
        PolicyDenied: one is not below an allowed folder, or a symlink is on the way.
        InvalidParams: it is not there any more.
    """
    tops = [os.path.realpath(folder) for folder in allowed]
    pairs = [mount.split(":")[:2] for mount in mounts]
    return tuple(_source(source, target, tops) for source, target in pairs)


def _source(source: str, target: str, tops: Iterable[str]) -> Source:
    top = next((top for top in tops if source == top or source.startswith(f"{top.rstrip('/')}/")), None)
    if top is None:
        raise PolicyDenied(
            f"sandbox.mounts: {source[:200]} is not below a folder this server allows; "
            "its option sandbox_mounts says which"
        )
    with ExitStack() as stack:
        try:
            here = _opened(stack, top, None)
            for name in filter(None, source[len(top) :].split("/")):
                here = _opened(stack, name, here)
                if stat.S_ISLNK(os.fstat(here).st_mode):
                    raise PolicyDenied(
                        f"sandbox.mounts: {source[:200]} leads elsewhere by now: {name[:200]} is a symlink; "
                        "put back what was there, or make another conversation"
                    )
            found = os.fstat(here)
        except FileNotFoundError:
            raise InvalidParams(
                f"sandbox.mounts: there is no {source[:200]} on the server's machine any more"
            ) from None
    return Source(target, found.st_dev, found.st_ino)


def _opened(stack: ExitStack, name: str, folder: int | None) -> int:
    descriptor = os.open(name, _PASS, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor


def box_differences(machine: Machine, profile: Profile | None) -> list[str]:
    """Return what the box finds in force in another way than asked, one phrase each."""
    if profile is None:
        return ["the box does not say what is in force"]
    return list(_differences(machine, profile))


def mount_differences(sources: Iterable[Source], profile: Profile | None) -> list[str]:
    """Return what is mounted of the machine, but is something else than what was allowed, one phrase each."""
    found = {mount.target: (mount.device, mount.inode) for mount in (profile.mounts if profile else ())}
    return [
        f"what is mounted at {source.target} is not what was allowed"
        for source in sources
        if found.get(source.target) != (source.device, source.inode)
    ]


def _differences(asked: Machine, found: Profile) -> Iterator[str]:
    is_task = asked.profile == "task"
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
    if asked.runtime not in OWN_KERNEL:
        if not found.no_new_privileges:
            yield "it may gain privileges"
        if found.seccomp != FILTERED or found.seccomp_filters == 1:  # 0: the kernel does not say
            yield "its system calls are not filtered twice, by the engine and by the box"
        yield from _limits(asked, found)
    if found.read_only_root == is_task:
        yield "its root is read-only" if is_task else "its root is writable"
    if asked.network in (None, "none") and set(found.interfaces) - {"lo"}:
        yield f"it has the networks {', '.join(found.interfaces)[:200]}"
    yield from _mounts(asked, found)


def _is_within(capabilities: str, most: int) -> bool:
    """Whether capabilities as the kernel writes them are none besides these."""
    try:
        return not int(capabilities or "0", 16) & ~most
    except ValueError:
        return False


def _limits(asked: Machine, found: Profile) -> Iterator[str]:
    limits: Sequence[tuple[str, int | None, int]] = (
        ("pids", found.pids_max, asked.pids or 0),
        ("memory", found.memory_max, asked.memory or 0),
    )
    for name, got, wanted in limits:
        if got is None or got > wanted:
            yield f"its limit of {name} is {got} instead of {wanted}"


def _mounts(asked: Machine, found: Profile) -> Iterator[str]:
    ours = {mount.target: mount.read_only for mount in asked.mounts} | dict.fromkeys(asked.volumes, False)
    seen = {mount.target: mount for mount in found.mounts}
    for target, read_only in ours.items():
        if target not in seen:
            yield f"{target} is not mounted"
        elif read_only and "ro" not in seen[target].options:
            yield f"{target} is writable"
    for target in seen:
        known = target in ours or target in TEMPORARY or target in _FROM_THE_ENGINE
        if (
            not known
            and not target.startswith(tuple(f"{place}/" for place in KERNEL))
            and target not in KERNEL
        ):
            yield f"there is a mount at {target[:200]}"
