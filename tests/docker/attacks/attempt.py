"""What an attack is, and the words in which attacks are written."""

import ctypes
import json
import os
import stat
import sys

GIVEN = json.loads(sys.argv[1]) if sys.argv[1:] and sys.argv[1].startswith("{") else {}
LIBC = ctypes.CDLL(None, use_errno=True)
ATTACKS = {}


class RefusedError(Exception):
    """The attack came to nothing without an error of the system."""


def attack(attempt):
    """Add an attack: it returns how far it got, or raises."""
    ATTACKS[attempt.__name__] = attempt
    return attempt


def each(kind, attempt, table):
    """Add an attack for each row of a table: a name, and what the attempt is made with."""
    for name, arguments in table.items():
        ATTACKS[f"{kind}_{name}"] = lambda arguments=arguments: attempt(*arguments)


def call(number, *arguments):
    """A call of the kernel by its number."""
    longs = [value if isinstance(value, ctypes.Array) else ctypes.c_long(value) for value in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *longs))


def checked(answer):
    """The answer of a function of C, unless it is an error."""
    if answer == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer


def enough(found):
    """What was found, if that is anything."""
    if not found:
        raise RefusedError("nothing")
    return str(list(found))[:200]


def lines(path):
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


def content(path):
    try:
        if path.startswith("/proc/") or (
            stat.S_ISREG(os.lstat(path).st_mode) and os.stat(path).st_size < 1 << 26
        ):
            with open(path, "rb") as file:
                return file.read(1 << 26)
    except OSError:
        pass
    return b""


def readable(path):
    try:
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def opens(path):
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def creates(folder):
    try:
        os.mkdir(os.path.join(folder, "made"))
        os.rmdir(os.path.join(folder, "made"))
    except OSError:
        return False
    return True


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
