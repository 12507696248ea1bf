"""A program that attacks the machine below it. `python -m attacks [JSON]` prints a line per attack.

It runs inside of what is attacked, so it needs nothing but a Python with ctypes. A line says `NAME: refused: why`,
`NAME: GOT THROUGH: how far`, or `NAME: BROKEN: …` when the attack itself does not work. An attack that gets through
changes nothing: programs of files are opened and not written, calls of the kernel get arguments that it looks at
only after it has checked who calls. The JSON object may give

* `canary`: a secret to look for, backwards, so that this program does not find itself;
* `search`: the folders in which it is looked for, in the place of all;
* `box`: the folder of the socket of the box; `boxes`: its processes, where others can be seen, too;
* `others`: files of others;
* `host_file`: a file of the host that must not be reached;
* `host_port`: a port on which somebody listens at all addresses of the host.
"""

import os
import platform
import signal
import sys

from . import files, kernel, limits, mounts, network, users
from .attempt import ATTACKS, RefusedError

SECONDS = 60
"""After which an attack that hangs is broken."""
SUBJECTS = (mounts, kernel, users, limits, files, network)


def main():
    """Try every attack in a process of its own."""
    if platform.machine() != "x86_64":
        sys.exit("the numbers of system calls here are those of x86-64")
    for name, attack in ATTACKS.items():
        print(f"{name}: {outcome(attack)}", flush=True)


def outcome(attack):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        os.write(writing, told(attack).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        said = answer.read().decode(errors="replace").replace("\n", " ")
    number = os.WTERMSIG(os.waitpid(pid, 0)[1])
    if number in (signal.SIGSYS, signal.SIGKILL):
        return f"refused: {signal.Signals(number).name}"
    return f"BROKEN: {signal.Signals(number).name}" if number else said


def told(attack):
    try:
        return f"GOT THROUGH: {attack()}"
    except (OSError, RefusedError) as exc:
        return f"refused: {exc}"
    except BaseException as exc:  # noqa: BLE001  whatever it is, the attack does not work
        return f"BROKEN: {type(exc).__name__}: {exc}"


if __name__ == "__main__":
    main()
