"""What a box gives up: system calls that no build or test needs, and of root all but to run commands as other users.

The filter of system calls holds for the box and all it starts. It stacks on whatever filter is in force already,
and nothing takes it away again. What it refuses: io_uring, BPF, perf, userfaultfd, keys, looking into other
processes, namespaces, mounts, file handles, kernel modules, kexec, swap, quotas, other personalities and calling
conventions, and sockets but for Unix, IP and routing.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

from agent_sdk.protocol.errors import IsolationUnavailable
from agent_sdk.workspace.users import User

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 4, 22, 38, 2

_NAMESPACES = 0x7E020000
"""The bits of clone that ask for namespaces."""
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Linux, 32 bits, a version number that begins with 2.6, and asking which one it is."""
_FAMILIES = (1, 2, 10)
"""Of sockets: Unix, IPv4, IPv6."""
_NETLINK, _ROUTE = 16, 0
_X32 = 0x40000000
_GVISOR = "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016"

_EVERYWHERE = (
    *(425, 426, 427),  # io_uring_setup, _enter, _register
    *(428, 429, 430, 431, 432, 433, 442, 467),  # open_tree, move_mount, fs…, mount_setattr, open_tree_attr
    *(438, 443),  # pidfd_getfd, quotactl_fd
)
"""Since Linux 5.1 a call has the same number on every machine."""
_CLONE3 = 435

_CAP_KILL, _CAP_SETGID, _CAP_SETUID, _CAP_LAST = 5, 6, 7, 63
KEPT = 1 << _CAP_KILL | 1 << _CAP_SETGID | 1 << _CAP_SETUID
_KEEP_AT_CHANGE, _DROP_BOUND, _SECURE_BITS = 8, 24, 28
_ROOT_IS_NOTHING = 0b11
"""The bits NOROOT and NOROOT_LOCKED."""
_VERSION_3 = 0x20080522


@dataclass(frozen=True)
class _Machine:
    arch: int
    denied: tuple[int, ...]
    clone: int
    personality: int
    sockets: tuple[int, int]
    """socket, socketpair"""
    x32: bool = False


_MACHINES = {
    "x86_64": _Machine(
        arch=0xC000003E,
        denied=(
            *(
                321,
                298,
                323,
                248,
                249,
                250,
            ),  # bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl
            *(101, 310, 311, 312, 272, 308),  # ptrace, process_vm_readv and _writev, kcmp, unshare, setns
            *(165, 166, 155, 303, 304),  # mount, umount2, pivot_root, name_to_handle_at, open_by_handle_at
            *(246, 320, 175, 313, 176),  # kexec_load and _file_load, init_, finit_ and delete_module
            *(167, 168, 169, 163, 179),  # swapon, swapoff, reboot, acct, quotactl
        ),
        clone=56,
        personality=135,
        sockets=(41, 53),
        x32=True,
    ),
    "aarch64": _Machine(
        arch=0xC00000B7,
        denied=(
            *(280, 241, 282, 217, 218, 219),
            *(117, 270, 271, 272, 97, 268),
            *(40, 39, 41, 264, 265),
            *(104, 294, 105, 273, 106),
            *(224, 225, 142, 89, 60),
        ),
        clone=220,
        personality=92,
        sockets=(198, 199),
    ),
}


def install_filter() -> None:
    """Filter the system calls of this thread and of all that it starts. To be called before there are others.

    In gVisor, which is a kernel of its own, nothing happens when that cannot filter.

    Raises:
        IsolationUnavailable: it cannot be installed.
    """
    import ctypes  # noqa: PLC0415  only a box in a container needs it

    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        raise IsolationUnavailable(
            f"there is no filter of system calls for {os.uname().machine}; use x86_64 or aarch64",
            phase="seccomp",
        )
    program = _program(machine)
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    pointer = ctypes.create_string_buffer(described, len(described))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(pointer), 0, 0
    ):
        number = ctypes.get_errno()
        if number == errno.EINVAL and _is_gvisor():
            return
        raise IsolationUnavailable(
            f"the filter of system calls was not accepted by the kernel: {os.strerror(number)}",
            phase="seccomp",
        )


def hide_memory() -> None:
    """Let no process look into this one, not even one of the same user: into its memory, environment and files.

    What is started from here on is not hidden. In gVisor nothing happens when that has no such thing.
    """
    import ctypes  # noqa: PLC0415  as above

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(0), 0, 0, 0)


def _is_gvisor() -> bool:
    with open("/proc/version") as version:
        return version.read().startswith(_GVISOR)


def _program(machine: _Machine) -> bytes:
    """The filter in classic BPF. Every block begins with the number of the call loaded, and ends by returning."""
    refuse = _give(_ERRNO | errno.EPERM)
    steps = [_load(_ARCH_AT), _step(_EQUAL, machine.arch, 1, 0), _give(_KILL), _load(_NUMBER_AT)]
    if machine.x32:
        steps += _when(_AT_LEAST, _X32, [refuse])
    for number in (*machine.denied, *_EVERYWHERE):
        steps += _when(_EQUAL, number, [refuse])
    steps += _when(
        _EQUAL, _CLONE3, [_give(_ERRNO | errno.ENOSYS)]
    )  # its flags are out of reach; libc takes clone
    steps += _when(
        _EQUAL, machine.clone, [_load_argument(0), *_when(_ANY_BIT, _NAMESPACES, [refuse]), _give(_ALLOW)]
    )
    steps += _when(_EQUAL, machine.personality, [_load_argument(0), *_allow(_PERSONALITIES), refuse])
    family = [
        _load_argument(0),
        *_allow(_FAMILIES),
        *_when(_EQUAL, _NETLINK, [_load_argument(2), *_allow((_ROUTE,)), _give(_ERRNO | errno.EAFNOSUPPORT)]),
        _give(_ERRNO | errno.EAFNOSUPPORT),
    ]
    for number in machine.sockets:
        steps += _when(_EQUAL, number, family)
    return b"".join([*steps, _give(_ALLOW)])


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _load(offset: int) -> bytes:
    return _step(_LOAD, offset)


def _load_argument(index: int) -> bytes:
    return _load(_ARGUMENTS_AT + 8 * index)  # its lower half: both machines are little-endian


def _give(verdict: int) -> bytes:
    return _step(_RETURN, verdict)


def _when(test: int, value: int, block: list[bytes]) -> list[bytes]:
    """Go through the block when the test holds, and past it when not."""
    return [_step(test, value, 0, len(block)), *block]


def _allow(values: tuple[int, ...]) -> list[bytes]:
    return [step for value in values for step in _when(_EQUAL, value, [_give(_ALLOW)])]


def become(user: User) -> None:
    """Become this user for good, with the capabilities KILL, SETGID and SETUID. To be called before there are threads.

    Commands have none of them: root does not count when a program starts, and nothing is left that one could gain.

    Raises:
        IsolationUnavailable: that is not possible here.
    """
    import ctypes  # noqa: PLC0415  as above

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    # EINVAL: a kernel that knows neither, such as gVisor's. Root gains nothing there either: nothing is left to gain.
    for option, value in (
        (_SECURE_BITS, _ROOT_IS_NOTHING),
        *((_DROP_BOUND, one) for one in range(_CAP_LAST + 1)),
    ):
        if libc.prctl(option, value, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
            raise _refused(ctypes.get_errno())
    if libc.prctl(_KEEP_AT_CHANGE, 1, 0, 0, 0):
        raise _refused(ctypes.get_errno())
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as exc:
        raise _refused(exc.errno or errno.EPERM) from None
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    both = (ctypes.c_uint32 * 6)(KEPT, KEPT, 0, 0, 0, 0)
    if libc.capset(header, both):
        raise _refused(ctypes.get_errno())


def _refused(number: int) -> IsolationUnavailable:
    reason = os.strerror(number)
    return IsolationUnavailable(f"the box cannot become its user: {reason}", phase="user", wanted="user")
