"""The rights of another user on files and on what /proc tells, for one thread and the length of a block.

A server that keeps boxes as another user has neither DAC_OVERRIDE nor SYS_PTRACE, and wants none: with the
box user's own rights it reads and removes what is theirs, and nothing they do can lead it to more.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_UNCHANGED = -1
"""No user: asks who it is."""


@contextmanager
def rights_of(user: int | None) -> Iterator[None]:
    """Have the rights of this user and of the group of the same number, in this thread; None: one's own.

    Linux only. Needs the capabilities SETUID and SETGID. Nothing in the block may wait for another thread or for
    the event loop.

    Raises:
        PermissionError: the capabilities are missing.
    """
    if user is None:
        yield
        return
    import ctypes  # noqa: PLC0415  half a megabyte that boxes do without

    libc = ctypes.CDLL(None)
    own_user, own_group = libc.setfsuid(_UNCHANGED), libc.setfsgid(_UNCHANGED)
    try:
        libc.setfsgid(user)
        libc.setfsuid(user)
        if (libc.setfsuid(_UNCHANGED), libc.setfsgid(_UNCHANGED)) != (user, user):
            raise PermissionError(errno.EPERM, f"cannot act as user {user}")
        yield
    finally:
        libc.setfsuid(own_user)
        libc.setfsgid(own_group)
