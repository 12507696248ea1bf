"""As whom commands run: users by their names, read from /etc/passwd alone, and whether this process may become them.

Libraries that know users elsewhere would be the image's in a sandbox, and are not asked.

A server that keeps boxes as another user has neither DAC_OVERRIDE nor SYS_PTRACE, and wants none: with that user's
rights on files and on what /proc tells (`fsuid`) it reads and removes what is theirs, and nothing they do can lead it
to more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agent_sdk.protocol.checks import whole
from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable

HIGHEST = 65_535
"""Of users and groups. Files of higher ones are out of reach for every command."""
_NEEDED = 1 << 6 | 1 << 7
"""The capabilities SETGID and SETUID."""
_ASK = -1
"""Of no user: setfsuid with it changes nothing, and returns the present one."""


@dataclass(frozen=True)
class User:
    """A user and its groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"

    @property
    def environment(self) -> dict[str, str]:
        """What it finds in the environment of its commands."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


def find_user(wanted: str, field: str = "user") -> User:
    """Return a user by its name or number, with `:group` or without. Blocks for two small files.

    Raises:
        InvalidParams: there is none.
    """
    name, _, group = wanted.partition(":")
    for entry in _entries("/etc/passwd", 6):
        if name == entry[0] or name == entry[2]:
            found = User(entry[0], int(entry[2]), int(entry[3]), (), entry[5] or "/")
            break
    else:
        number = (
            "0" if name == "root" else name
        )  # also where there is no such file: in an image of one program
        if not number.isdecimal():
            raise InvalidParams(f"{field}: there is no user {name[:64]!r} in /etc/passwd here")
        found = User(number, int(number), int(number))
    gid, groups = (
        found.gid,
        [int(entry[2]) for entry in _entries("/etc/group", 4) if found.name in entry[3].split(",")],
    )
    if group:
        named = [int(entry[2]) for entry in _entries("/etc/group", 3) if group in (entry[0], entry[2])]
        if not named and not group.isdecimal():
            raise InvalidParams(f"{field}: there is no group {group[:64]!r} in /etc/group here")
        gid, groups = named[0] if named else int(group), []
    if max(found.uid, gid, *groups, 0) > HIGHEST:
        raise InvalidParams(
            f"{field}: numbers of users and groups are at most {HIGHEST} (got {wanted[:64]!r})"
        )
    return User(found.name, found.uid, gid, tuple(sorted({gid, *groups})), found.home)


def give_name(user: User) -> User:
    """Return this user with a name that /etc/passwd has; it is written there when there is none. Blocks.

    Raises:
        OSError: it cannot be written.
    """
    if not user.name.isdecimal():
        return user
    taken = {entry[0] for entry in _entries("/etc/passwd", 6)}
    usual = "agent" if user.uid else "root"
    name = next(name for name in (usual, f"agent-{user.uid}") if name not in taken)
    os.makedirs("/etc", exist_ok=True)
    with open("/etc/passwd", "a") as file:
        file.write(f"{name}:x:{user.uid}:{user.gid}:{name}:{user.home}:/bin/sh\n")
    return User(name, user.uid, user.gid, user.groups, user.home)


def other_user(wanted: str | None) -> User | None:
    """Return as whom a command runs; None: as this process.

    Raises:
        InvalidParams: there is no such user.
        IsolationUnavailable: this process may not become it.
    """
    if wanted is None:
        return None
    user = find_user(wanted)
    if (user.uid, user.gid) == (os.geteuid(), os.getegid()):
        return None
    if not _may_change():
        raise IsolationUnavailable(
            f"user: commands of this workspace run as user {os.geteuid()}, who may not become {wanted[:64]!r}; leave "
            'it out, or ask for a sandbox with profile="task"',
            wanted="user",
        )
    return user


@contextmanager
def fsuid(user: int | None) -> Iterator[None]:
    """Be this user and the group of the same number to file systems, in this thread; None: change nothing.

    Needs the capabilities SETUID and SETGID. Nothing in the block may wait for another thread or for the event loop.

    Raises:
        PermissionError: the capabilities are missing.
    """
    if user is None:
        yield
        return
    import ctypes  # noqa: PLC0415  half a megabyte that boxes do without

    libc = ctypes.CDLL(None)
    own_user, own_group = libc.setfsuid(_ASK), libc.setfsgid(_ASK)
    try:
        libc.setfsgid(user)
        libc.setfsuid(user)
        if (libc.setfsuid(_ASK), libc.setfsgid(_ASK)) != (user, user):
            raise PermissionError(errno.EPERM, f"cannot act as user {user}")
        yield
    finally:
        libc.setfsuid(own_user)
        libc.setfsgid(own_group)


def _may_change() -> bool:
    try:
        with open("/proc/self/status") as lines:
            effective = [int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")]
    except OSError:
        return os.geteuid() == 0
    return bool(effective) and effective[0] & _NEEDED == _NEEDED


def _entries(path: str, fields: int) -> Iterator[list[str]]:
    """The lines of a file of users or groups that make sense."""
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                entry = line.rstrip("\n").split(":")
                numbers = entry[2:4] if fields == 6 else entry[2:3]
                if len(entry) >= fields and all(whole(number) is not None for number in numbers):
                    yield entry
    except OSError:
        return
