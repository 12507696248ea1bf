"""Becoming the user of a sandbox, and keeping nothing of root but to run, and end, commands as other users.

Commands have none of it: root does not count when a program starts, and nothing is left that one could gain.
"""

from __future__ import annotations

import ctypes
import errno
import os

from agent_sdk.protocol.errors import IsolationUnavailable
from agent_sdk.workspace.users import User

_KILL, _SETGID, _SETUID, _LAST = 5, 6, 7, 63
KEPT = 1 << _KILL | 1 << _SETGID | 1 << _SETUID
_KEEP_AT_CHANGE, _DROP_BOUND, _SECURE_BITS = 8, 24, 28
_ROOT_IS_NOTHING = 0b11
"""The bits NOROOT and NOROOT_LOCKED."""
_VERSION_3 = 0x20080522


def become(user: User) -> None:
    """Become this user for good, with the capabilities KILL, SETGID and SETUID. To be called before there are threads.

    Raises:
        IsolationUnavailable: that is not possible here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    # EINVAL: a kernel that knows neither, such as gVisor's. Root gains nothing there either: nothing is left to gain.
    for option, value in (
        (_SECURE_BITS, _ROOT_IS_NOTHING),
        *((_DROP_BOUND, one) for one in range(_LAST + 1)),
    ):
        if libc.prctl(option, value, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
            _checked(-1)
    _checked(libc.prctl(_KEEP_AT_CHANGE, 1, 0, 0, 0))
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as exc:
        raise _refused(exc.strerror or "refused") from None
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    both = (ctypes.c_uint32 * 6)(KEPT, KEPT, 0, 0, 0, 0)
    _checked(libc.capset(header, both))


def _checked(answer: int) -> None:
    if answer:
        raise _refused(os.strerror(ctypes.get_errno()))


def _refused(reason: str) -> IsolationUnavailable:
    return IsolationUnavailable(f"the box cannot become its user: {reason}", phase="user", wanted="user")
