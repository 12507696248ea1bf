"""Who one is, what one may, and what others of the machine leave open."""

import ctypes
import os
import signal
import stat
import struct

from .attempt import GIVEN, RefusedError, attack, call, content, enough, lines, opens, pids, readable

ELSEWHERE = ("/proc", "/sys", "/dev", "/usr", "/lib", "/opt")
SETUID = [
    f"{folder}/{name}"
    for folder in ("/bin", "/usr/bin")
    for name in ("su", "mount", "umount", "passwd", "chfn")
]


def status(*names):
    fields = dict(line.split(":", 1) for line in lines("/proc/self/status"))
    return [fields.get(name, "").strip() for name in names]


@attack
def hold_a_capability():
    held = status("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    return enough([one for one in held if int(one, 16)])


@attack
def be_root():
    return enough([one for one in (*os.getresuid(), *os.getresgid(), *os.getgroups()) if one == 0])


@attack
def gain_privileges():
    return enough([] if status("NoNewPrivs") == ["1"] else ["NoNewPrivs is not set"])


@attack
def run_without_filter():
    return enough([] if status("Seccomp") == ["2"] else status("Seccomp", "Seccomp_filters"))


@attack
def run_a_setuid_program():
    found = [path for path in SETUID if os.path.exists(path) and os.stat(path).st_mode & stat.S_ISUID]
    return enough([path for path in found if os.stat(path).st_uid == effective_user_of(path) != os.getuid()])


def effective_user_of(path):
    """Whom a program runs as; it is ended before it does anything."""
    reading, writing = os.pipe()
    silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    pid = os.posix_spawn(path, [path], {}, file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), *silent])
    try:
        return next(int(line.split()[2]) for line in lines(f"/proc/{pid}/status") if line.startswith("Uid:"))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)


def own_file():
    path = os.path.join(os.getcwd(), "own-file")
    open(path, "w").close()
    return path


@attack
def give_a_file_to_root():
    os.chown(own_file(), 0, 0)
    return "root owns it"


@attack
def give_a_file_capabilities():
    os.setxattr(own_file(), "security.capability", struct.pack("<IIIII", 0x02000001, 0xFFFFFFFF, 0, 0, 0))
    return "it has them"


@attack
def set_a_trusted_attribute():
    os.setxattr(own_file(), "trusted.mark", b"x")
    return "it is set"


def strangers():
    """Processes of other users."""
    return [pid for pid in pids() if user_of(pid) != os.getuid()]


def user_of(pid):
    """Whoever owns its files in /proc may be another one: nobody, of a process that hides."""
    found = [line.split()[1] for line in lines(f"/proc/{pid}/status") if line.startswith("Uid:")]
    return int(found[0]) if found else -1


def boxes():
    """The processes that keep this one: they see that it has a terminal, and what it says."""
    return GIVEN.get("boxes") or [
        pid for pid in pids() if b"agent_sdk.box" in content(f"/proc/{pid}/cmdline")
    ]


@attack
def open_memory_of_the_box():
    return enough([pid for pid in boxes() if opens(f"/proc/{pid}/mem")])


@attack
def read_environment_of_the_box():
    return enough([pid for pid in boxes() if readable(f"/proc/{pid}/environ")])


@attack
def list_descriptors_of_the_box():
    return enough([pid for pid in boxes() if os.listdir(f"/proc/{pid}/fd")])


@attack
def take_a_descriptor_of_the_box():
    return enough([call(438, os.pidfd_open(pid), 3, 0) for pid in boxes()])


SEIZE, INTERRUPT = 0x4206, 0x4207


@attack
def trace_the_box():
    return enough([pid for pid in boxes() if traced(pid)])


def traced(pid):
    """Whether it could be; it goes on at the end of this process."""
    return call(101, SEIZE, pid, 0, 0) == 0


@attack
def read_memory_of_the_box():
    """By the call that needs no file: a byte of where its program is, which the kernel looks at only then."""
    mine = ctypes.create_string_buffer(1)
    here = struct.pack("QQ", ctypes.addressof(mine), 1)
    return enough([pid for pid in boxes() if reads(pid, here)])


def reads(pid, here):
    there = struct.pack("QQ", int(content(f"/proc/{pid}/maps").split(b"-")[0] or b"400000", 16), 1)
    return call(310, pid, ctypes.create_string_buffer(here), 1, ctypes.create_string_buffer(there), 1, 0) == 1


@attack
def see_strangers():
    return enough(strangers())


@attack
def read_environment_of_strangers():
    return enough([pid for pid in strangers() if readable(f"/proc/{pid}/environ")])


@attack
def open_memory_of_strangers():
    return enough([pid for pid in strangers() if opens(f"/proc/{pid}/mem")])


@attack
def walk_into_strangers():
    return enough([pid for pid in strangers() if os.path.isdir(f"/proc/{pid}/root/etc")])


@attack
def list_descriptors_of_strangers():
    return enough([pid for pid in strangers() if os.listdir(f"/proc/{pid}/fd")])


@attack
def signal_strangers():
    for pid in strangers():
        os.kill(pid, 0)
    return enough(strangers())


@attack
def find_the_secret():
    secret = GIVEN.get("canary", "")[::-1].encode()
    if not secret:
        raise RefusedError("nothing to look for")
    return enough([path for path in all_files() if secret in content(path)])


def all_files():
    yield from (f"/proc/{pid}/{name}" for pid in pids() for name in ("environ", "cmdline"))
    for top in GIVEN.get("search", ["/"]):
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if os.path.join(folder, name) not in ELSEWHERE]
            yield from (os.path.join(folder, name) for name in names)
