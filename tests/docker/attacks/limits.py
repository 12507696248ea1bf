"""More than one's share."""

import ctypes
import os

from .attempt import LIBC, attack, call, checked, each

NO_LIMIT = 2**64 - 1
KINDS = {"core": (4,), "processes": (6,), "descriptors": (7,), "file_size": (1,), "locked_memory": (8,)}


def raise_a_limit(kind):
    both = (ctypes.c_uint64 * 2)()
    checked(LIBC.getrlimit(kind, both))
    if both[1] == NO_LIMIT:
        return "there is none"
    both[0] = both[1] = both[1] + 1
    checked(LIBC.setrlimit(kind, both))
    return f"raised to {both[1]}"


each("raise", raise_a_limit, KINDS)


@attack
def be_nice_to_nobody():
    os.setpriority(os.PRIO_PROCESS, 0, -10)
    return "nice -10"


@attack
def run_in_real_time():
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    return "SCHED_FIFO"


@attack
def use_disks_first():
    return call(251, 1, 0, 1 << 13)  # ioprio_set, real time


@attack
def survive_others():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    return "oom_score_adj -1000"


@attack
def lock_memory():
    size = 64 << 20
    return checked(LIBC.mlock(ctypes.create_string_buffer(size), ctypes.c_size_t(size)))
