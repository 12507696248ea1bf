"""The filter of system calls: what it refuses, what it lets through, on both machines it knows."""

import asyncio
import errno
import json
import os
import struct
import sys

import pytest

from agent_sdk.box.seccomp import _MACHINES, _program

ALLOWED, KILLED = "allowed", "killed"

# name: (number on x86_64, number on aarch64)
REFUSED = {
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
}
NEEDED = {
    "read": (0, 63),
    "execve": (59, 221),
    "openat": (257, 56),
    "futex": (202, 98),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "memfd_create": (319, 279),
    "seccomp": (317, 277),
    "openat2": (437, 437),
}
MACHINES = [("x86_64", 0), ("aarch64", 1)]


def verdict(machine, number, *arguments, arch=None):
    """What the filter answers, worked out as the kernel does."""
    described = _MACHINES[machine]
    data = struct.pack("<iIQ6Q", number, arch or described.arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    steps = list(struct.iter_unpack("<HBBI", _program(described)))
    at, value = 0, 0
    while True:
        code, yes, no, operand = steps[at]
        match code:
            case 0x20:
                (value,) = struct.unpack_from("<I", data, operand)
            case 0x06:
                return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}.get(operand, operand & 0xFFFF)
            case _:
                holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
                at += yes if holds else no
        at += 1


@pytest.mark.parametrize(("machine", "nth"), MACHINES)
def test_what_no_build_or_test_needs_is_refused(machine, nth):
    answers = {name: verdict(machine, numbers[nth]) for name, numbers in REFUSED.items()}
    assert answers == dict.fromkeys(REFUSED, errno.EPERM)


@pytest.mark.parametrize(("machine", "nth"), MACHINES)
def test_what_every_program_needs_is_let_through(machine, nth):
    assert {name: verdict(machine, numbers[nth]) for name, numbers in NEEDED.items()} == dict.fromkeys(
        NEEDED, ALLOWED
    )


@pytest.mark.parametrize(("machine", "clone"), [("x86_64", 56), ("aarch64", 220)])
def test_processes_and_threads_are_made_but_no_namespaces(machine, clone):
    thread = 0x3D0F00
    assert verdict(machine, clone, 17) == verdict(machine, clone, thread) == ALLOWED
    for namespace in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, clone, 17 | namespace) == errno.EPERM
    assert verdict(machine, 435) == errno.ENOSYS  # clone3: libc goes on with clone


@pytest.mark.parametrize(
    ("machine", "socket"), [("x86_64", 41), ("x86_64", 53), ("aarch64", 198), ("aarch64", 199)]
)
def test_sockets_are_unix_ip_and_routing(machine, socket):
    assert [family for family in range(64) if verdict(machine, socket, family) == ALLOWED] == [1, 2, 10, 16]
    assert verdict(machine, socket, 40) == errno.EAFNOSUPPORT
    assert {verdict(machine, socket, 16, 3, protocol) for protocol in range(1, 32)} == {errno.EAFNOSUPPORT}


@pytest.mark.parametrize(("machine", "personality"), [("x86_64", 135), ("aarch64", 92)])
def test_a_personality_may_be_asked_for_but_not_weakened(machine, personality):
    assert verdict(machine, personality, 0xFFFFFFFF) == verdict(machine, personality, 0) == ALLOWED
    assert verdict(machine, personality, 0x0040000) == errno.EPERM  # no randomised addresses
    assert verdict(machine, personality, 0x0400000) == errno.EPERM  # READ_IMPLIES_EXEC


def test_other_ways_to_call_the_kernel_are_closed():
    assert verdict("x86_64", 0x40000000) == errno.EPERM  # x32
    assert verdict("x86_64", 0, arch=0x40000003) == KILLED  # 32 bits
    assert verdict("aarch64", 0, arch=0xC000003E) == KILLED


TRY = """
import ctypes, errno, json, os, socket, subprocess, sys, threading
from agent_sdk.box.seccomp import install_filter
install_filter()
call = ctypes.CDLL(None, use_errno=True).syscall
def tried(number):
    ctypes.set_errno(0)
    call(number, 0, 0, 0, 0, 0)
    return errno.errorcode.get(ctypes.get_errno())
answers = {name: tried(number) for name, number in json.loads(sys.argv[1]).items()}
threading.Thread(target=answers.__setitem__, args=("thread", "ran")).start()
try:
    socket.socket(40, socket.SOCK_STREAM)
except OSError as exc:
    answers["vsock"] = errno.errorcode[exc.errno]
socket.socketpair()[0].close()
answers["status"] = subprocess.check_output(["grep", "Seccomp\\|NoNew", "/proc/self/status"], text=True).split()
print(json.dumps(answers))
"""


async def test_the_kernel_accepts_it_and_what_is_started_has_it_too():
    nth = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    wanted = {name: numbers[nth] for name, numbers in REFUSED.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", TRY, json.dumps(wanted)), stdout=asyncio.subprocess.PIPE
    )
    answers = json.loads((await process.communicate())[0])
    status = answers.pop("status")
    assert (answers.pop("thread"), answers.pop("vsock")) == ("ran", "EAFNOSUPPORT")
    assert answers == dict.fromkeys(wanted, "EPERM")
    assert status[:4] == ["NoNewPrivs:", "1", "Seccomp:", "2"]
