"""Calls that only the privileged may make, by their numbers on x86-64."""

import ctypes
import errno
import mmap
import os
import signal
import struct

from .attempt import LIBC, attack, call, checked, each

NULL, CWD = 0, -100
NOWHERE = ctypes.create_string_buffer(b"/nowhere/at/all")
ROOT = ctypes.create_string_buffer(b"/")
ZEROS = ctypes.create_string_buffer(4096)
NEW_USER, NEW_FILES, NEW_PIDS, NEW_NET = 0x10000000, 0x00020000, 0x20000000, 0x40000000
REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS}
NO_NEW_PRIVILEGES = 38

CALLS = {
    "io_uring": (425, 1, ZEROS),
    "bpf": (321, 0, ZEROS, 120),
    "perf_event_open": (298, ZEROS, 0, -1, -1, 0),
    "userfaultfd": (323, 1),
    "keyctl": (250, 0, -3, 0),
    "add_key": (248, NOWHERE, NOWHERE, ZEROS, 1, -2),
    "request_key": (249, NOWHERE, NOWHERE, NULL, -2),
    "ptrace_init": (101, 0x4206, 1, 0, 0),
    "ptrace_traceme": (101, 0, 0, 0, 0),
    "process_vm_readv": (310, 1, ZEROS, 1, ZEROS, 1, 0),
    "process_vm_writev": (311, 1, ZEROS, 1, ZEROS, 1, 0),
    "kcmp": (312, 1, 1, 0, 0, 0),
    "unshare_user": (272, NEW_USER),
    "unshare_mounts": (272, NEW_FILES),
    "unshare_net": (272, NEW_NET),
    "unshare_pids": (272, NEW_PIDS),
    "clone3_user": (435, ctypes.create_string_buffer(struct.pack("11Q", NEW_USER, *[0] * 10)), 88),
    "umount_root": (166, ROOT, 5),
    "pivot_root": (155, NOWHERE, NOWHERE),
    "chroot": (161, ROOT),
    "fsopen": (430, ctypes.create_string_buffer(b"tmpfs"), 0),
    "fspick": (433, CWD, ROOT, 0),
    "open_tree": (428, CWD, ROOT, 0),
    "move_mount": (429, -1, NOWHERE, -1, NOWHERE, 0),
    "mount_setattr": (442, CWD, ROOT, 0, ZEROS, 32),
    "name_to_handle_at": (303, CWD, ROOT, ZEROS, ZEROS, 0),
    "open_by_handle_at": (304, CWD, ZEROS, 0),
    "kexec_load": (246, 0, 0, NULL, 0xFFFF),
    "kexec_file_load": (320, -1, -1, 0, NULL, 0xFFFF),
    "init_module": (175, ZEROS, 0, ZEROS),
    "finit_module": (313, -1, ZEROS, 0),
    "delete_module": (176, NOWHERE, 0o4000),
    "reboot": (169, 0, 0, 0, NULL),
    "swapon": (167, NOWHERE, 0),
    "swapoff": (168, NOWHERE),
    "acct": (163, NOWHERE),
    "quotactl": (179, 0x80000500, NOWHERE, 0, NULL),
    "settimeofday": (164, NULL, NULL),
    "clock_settime": (227, 0, NULL),
    "iopl": (172, 3),
    "ioperm": (173, 0x80, 1, 1),
    "syslog": (103, 3, ZEROS, 4096),
    "personality": (135, 0x0040000),
    "fanotify_init": (300, 0, 0),
    "x32_unshare": (0x40000000 | 272, NEW_USER),
    "setuid_0": (105, 0),
    "setgid_0": (106, 0),
    "setgroups": (116, 1, ZEROS),
}


def asked(number, *arguments):
    """Whatever the kernel answers but a refusal is a way in: it looks at the arguments only then."""
    try:
        return f"the kernel answers {call(number, *arguments)}"
    except OSError as exc:
        if exc.errno in REFUSALS:
            raise
        return f"the kernel looked at it: {exc.strerror}"


each("call", asked, CALLS)


def own_namespace(name):
    return call(308, os.open(f"/proc/self/ns/{name}", os.O_RDONLY), 0)


each("enter", own_namespace, {name: (name,) for name in ("uts", "net", "mnt", "pid")})


@attack
def clone_user():
    pid = call(56, NEW_USER | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@attack
def call_as_32_bit():
    """`getpid` by the number and the door of 32-bit programs, where the numbers of a filter mean other calls."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()


@attack
def steal_a_descriptor_of_init():
    return call(438, os.pidfd_open(1), 0, 0)


@attack
def set_hostname():
    name = os.uname().nodename.encode()
    return call(170, ctypes.create_string_buffer(name), len(name))


@attack
def drop_no_new_privileges():
    return checked(LIBC.prctl(NO_NEW_PRIVILEGES, 0, 0, 0, 0))
