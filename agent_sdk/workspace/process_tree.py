"""All the processes of an operation, found and ended, however they tried to get away.

A process belongs to an operation when its session is the operation's, when an ancestor belongs to it,
or when the marker stands in the environment it was started with. So `setsid`, double forks and new
process groups do not help it; only clearing the environment *and* losing its parent *and* leaving the
session together do. Each found process is held by a pidfd, so no signal ever meets a process that got
a recycled number. Where pidfds are refused or descriptors are out, its start time is compared right before
each signal, and its end is looked for.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from agent_sdk.workspace.contract import KILL_GRACE_SECONDS
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.users import fsuid

# After KILL only a process inside an uninterruptible system call stays; nobody can wait for that.
_DEATH_SECONDS = 2.0
_LOOK_SECONDS = 0.05
"""Between two looks at processes whose ends nothing tells."""
_ROUNDS = 50
_LOOKS = 50
_WORKING = (b"R", b"D")
_FORKED_ONLY = 0x40


class Seen(NamedTuple):
    """A living process, as it was when it was looked at."""

    pid: int
    parent: int
    session: int
    started: int
    """Clock ticks since boot."""
    memory: int
    """Bytes; a thread of the kernel has none."""
    working: bool
    """It runs or would like to, or waits for a disk."""
    stopped: bool
    """By a signal."""
    forked: bool
    """It may be a copy of its parent still: it has not become another program, as far as one can see."""

    @property
    def identity(self) -> tuple[int, int]:
        """The pid and start time, which together name this process for ever; parent and session may change."""
        return self.pid, self.started


@dataclass
class Tree:
    """What identifies the processes of one operation, or of a whole workspace."""

    marker: bytes
    """`NAME=value`, or its beginning, as it stands in an environment."""
    leaders: dict[int, int | None] = field(default_factory=dict)
    """Pid of each session leader; with the tick of its end once its number may be given to others."""
    user: int | None = None
    """Whose processes they are, where only their owner may read environments; None: one's own."""


def tick_now() -> int:
    """Return clock ticks since boot, as /proc counts them."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def started_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None: there is none of this number."""
    seen = _look_at(pid)
    return None if seen is None else seen.started


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    try:
        seen = _look_at(pid)
    except OSError:
        return False
    return seen is not None and seen.stopped


def children(pid: int) -> list[int]:
    """Return the living children of a process, the oldest first. Blocks for some milliseconds."""
    found = [seen for seen in all_processes() if seen.parent == pid]
    return [seen.pid for seen in sorted(found, key=lambda seen: (seen.started, seen.pid))]


def find(tree: Tree) -> set[Seen]:
    """Return the living processes of a tree. Blocks for some milliseconds."""
    table = {seen.pid: seen for seen in all_processes()}
    table.pop(os.getpid(), None)
    with fsuid(tree.user):
        chosen = {pid for pid, seen in table.items() if _belongs(seen, tree)}
    while True:
        more = {
            pid
            for pid, seen in table.items()
            if pid not in chosen and (seen.parent in chosen or seen.session in chosen)
        }
        if not more:
            return {table[pid] for pid in chosen}
        chosen |= more


def _belongs(seen: Seen, tree: Tree) -> bool:
    if seen.session in tree.leaders:
        ended = tree.leaders[seen.session]
        if ended is None or seen.started <= ended:
            return True
    try:
        return b"\0" + tree.marker in b"\0" + _environment(seen) + b"\0"
    except OSError as exc:  # gone, or somebody else's
        _refuse_blindness(exc)
        return False


def _environment(seen: Seen) -> bytes:
    """The environment a process was started with. While it changes into another program it seems to have none."""
    environment = b""
    for _ in range(_LOOKS if seen.memory else 0):
        with open(f"/proc/{seen.pid}/environ", "rb") as file:
            environment = file.read()
        if environment:
            break
        os.sched_yield()
    return environment


def _refuse_blindness(exc: OSError) -> None:
    """Raise what says nothing about the process: no descriptor is left to look at it with."""
    if exc.errno in (errno.EMFILE, errno.ENFILE):
        raise exc


def all_processes() -> Iterable[Seen]:
    """Yield every living process that can be seen."""
    return _seen(_numbers())


def younger(pid: int, since: int) -> Iterable[Seen]:
    """Yield the living processes that were started at tick `since` or later, when `pid` was the next free number.

    It looks at few: numbers are given in order, so as long as they did not start anew the others are older.
    """
    numbers = _numbers()
    with suppress(OSError, ValueError), open("/proc/loadavg") as file:
        if int(file.read().split()[-1]) >= pid:
            numbers = [number for number in numbers if number >= pid]
    return (seen for seen in _seen(numbers) if seen.started >= since)


def _numbers() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _seen(numbers: Iterable[int]) -> Iterable[Seen]:
    return (seen for number in numbers if (seen := _look_at(number)) is not None)


def _look_at(pid: int) -> Seen | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError as exc:
        _refuse_blindness(exc)
        return None
    # The name in parentheses may hold anything, parentheses and spaces included.
    words = text[text.rindex(b")") + 2 :].split()
    if words[0] in (b"Z", b"X"):
        return None
    return Seen(
        pid,
        int(words[1]),
        int(words[3]),
        int(words[19]),
        int(words[20]),
        words[0] in _WORKING,
        words[0] == b"T",
        _is_copy(int(words[6])),
    )


def _is_copy(flags: int) -> bool:
    return not flags or bool(flags & _FORKED_ONLY)


def _lives(seen: Seen) -> bool:
    now = _look_at(seen.pid)
    return now is not None and now.identity == seen.identity


class _Held:
    """Processes held by pidfds as far as those can be had, so that their ends can be awaited."""

    def __init__(self, found: Iterable[Seen]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fds: dict[Seen, int | None] = {}
        self._all_gone = self._loop.create_future()
        # Parents first: a shell whose child dies before it would go on with its next command.
        for seen in sorted(found, key=lambda seen: (seen.started, seen.pid)):
            try:
                fd = os.pidfd_open(seen.pid)
            except ProcessLookupError:
                continue
            except OSError:  # refused, or no descriptor is left
                self._fds[seen] = None
                continue
            try:
                lives = _lives(seen)
            except OSError:  # the pidfd was the last descriptor
                os.close(fd)
                self._fds[seen] = None
                continue
            if lives:
                self._fds[seen] = fd
                self._loop.add_reader(fd, self._drop, seen)
            else:
                os.close(fd)
        self._settle()

    def send(self, numbers: Iterable[signal.Signals], already: set[tuple[int, int]]) -> None:
        for seen, fd in self._fds.items():
            for number in numbers if seen.identity not in already else ():
                with suppress(OSError):
                    _send(seen, fd, number)

    async def gone(self, seconds: float) -> None:
        """Wait so long for the ends of all."""
        deadline = self._loop.time() + seconds
        while not self._all_gone.done() and (left := deadline - self._loop.time()) > 0:
            unheld = [seen for seen, fd in self._fds.items() if fd is None]
            await asyncio.wait((self._all_gone,), timeout=min(left, _LOOK_SECONDS) if unheld else left)
            for seen in unheld:
                with suppress(OSError):
                    if not _lives(seen):
                        self._drop(seen)

    def close(self) -> None:
        for seen in tuple(self._fds):
            self._drop(seen)

    def _drop(self, seen: Seen) -> None:
        fd = self._fds.pop(seen)
        if fd is not None:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._settle()

    def _settle(self) -> None:
        if not self._fds and not self._all_gone.done():
            self._all_gone.set_result(None)


def _send(seen: Seen, fd: int | None, number: signal.Signals) -> None:
    if fd is not None:
        try:
            return signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return None
        except OSError:  # refused, as the call before it can be
            pass
    if _lives(seen):
        os.kill(seen.pid, number)
    return None


async def end_tree(tree: Tree, *, hang_up: bool = False, grace: float = KILL_GRACE_SECONDS) -> None:
    """End all processes of a tree: TERM, then after `grace` seconds KILL, until none is left.

    Args:
        tree: what to end; `leaders` may be completed meanwhile.
        hang_up: send HUP as well, which interactive shells obey (they ignore TERM).
        grace: seconds between TERM and KILL; 0: KILL at once.

    Raises:
        OSError: no descriptor came free to look for the processes with; the groups of the leaders got the signals.
    """
    # CONT, because a stopped process acts on TERM only when it goes on.
    gentle = (*((signal.SIGHUP,) if hang_up else ()), signal.SIGTERM, signal.SIGCONT)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    told: set[tuple[int, int]] = set()
    kills = 0
    while True:
        late = loop.time() >= deadline
        numbers = (signal.SIGKILL,) if late else gentle
        try:
            found = await in_thread(find, Tree(tree.marker, dict(tree.leaders), tree.user))
        except OSError:  # no descriptor is left to look with
            if kills > _ROUNDS:
                raise
            told |= _send_to_groups(tree, numbers, set() if late else told)
            await asyncio.sleep(_LOOK_SECONDS)
            kills += late
            continue
        if not found:
            return
        held = _Held(found)
        try:
            held.send(numbers, set() if late else told)
            await held.gone(_DEATH_SECONDS if late else deadline - loop.time())
        finally:
            held.close()
        told |= {seen.identity for seen in found}
        kills += late
        if kills > _ROUNDS:
            return


def _send_to_groups(
    tree: Tree, numbers: Iterable[signal.Signals], already: set[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Send to the groups of the leaders that have not ended, whose numbers are still their own."""
    leaders = {(pid, 0) for pid, ended in tree.leaders.items() if ended is None} - already
    for pid, _ in leaders:
        for number in numbers:
            with suppress(OSError):
                os.killpg(pid, number)
    return leaders
