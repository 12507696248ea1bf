"""When the output of a command that has ended is whole: who still carries some of it, and who only holds its pipes.

Two kinds of processes can have the pipes of a command open after its end. A filter that it wrote through
(`exec > >(tee log)`, `cmd > >(cat)`) has a part of its output in its hands: that is waited for. A child in the
background (`sleep 100 &`) lives a life of its own, and nobody waits for it. A filter is one that reads a pipe;
it is bound to end once nobody has that pipe's writing end any more.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Collection, Set
from contextlib import suppress
from typing import NamedTuple

from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.pipes import PipeReader
from agent_sdk.workspace.process_tree import Seen, younger

QUIET_SECONDS = 0.05
"""So long after the end and after the last byte, whoever does not work any more is believed to have said all."""
_UNCERTAIN_SECONDS = 1.0
"""So long after the end at most, a filter is waited for that others in the background write to as well."""
_SLEEP_SECONDS = 1.0
"""So long a filter that is bound to end may sleep, or wait for somebody, without a word."""
_WORK_SECONDS = 10.0
"""So long a filter that is bound to end may work without a word."""

_LOOKS = 8

End = tuple[int, int]
"""What the writing end of a pipe is known by in all processes, device and inode; or a terminal, 0 and its number."""


class _Carriers(NamedTuple):
    """Those who may carry some of the output."""

    there: bool = False
    bound_to_end: bool = False
    working: bool = False
    """One of them runs or would like to at this moment, or waits for a disk."""
    trace: frozenset[tuple[int, int, bytes]] = frozenset()
    """Who they are and how often each was on a processor: other than before when they worked in between."""


class _Process(NamedTuple):
    seen: Seen
    reads: frozenset[End]
    writes: frozenset[End]

    @property
    def itself(self) -> set[int]:
        """An event loop writes to itself, to wake itself; what was forked just now has what its parent had."""
        return set() if self.seen.forked and self.seen.working else {self.seen.pid}


def end_of(fd: int) -> End:
    """Return what an open pipe or terminal is known by."""
    return _end(os.fstat(fd))


async def take_trailing_output(
    readers: Collection[PipeReader],
    ends: Set[End],
    pid: int,
    since: int,
    *,
    source: End | None = None,
    lives_on: int | None = None,
) -> None:
    """Return when all is taken that a command has said which has ended just now.

    Args:
        readers: what reads its pipes or its terminal.
        ends: where it wrote to.
        pid: of the process.
        since: clock ticks since boot, before it was started.
        source: its own input, which feeds no filter.
        lives_on: the shell that ran the command; what only others write is none of the command's.
    """
    loop = asyncio.get_running_loop()
    began, before = loop.time(), _Carriers()
    while listening := [reader for reader in readers if reader.open]:
        try:
            carriers = await in_thread(_look, ends, pid, since, source, lives_on)
        except OSError:  # no descriptor is left to look with
            break
        now = loop.time()
        quiet = now - max(began, *(now if reader.paused else reader.heard for reader in listening))
        working = carriers.working or carriers.trace != before.trace
        if carriers.bound_to_end:
            patience = (_WORK_SECONDS if working else _SLEEP_SECONDS) - quiet
        else:
            patience = began + _UNCERTAIN_SECONDS - now
            patience = patience if working else min(patience, QUIET_SECONDS - quiet)
        if not carriers.there or patience <= 0:
            break
        await asyncio.wait([reader.ended for reader in listening], timeout=min(patience, QUIET_SECONDS))
        before = carriers
    for reader in readers:
        reader.drain()


def _look(ends: Set[End], pid: int, since: int, source: End | None, shell: int | None) -> _Carriers:
    """Look at every process that was started since then. Blocks for some milliseconds."""
    by_pid: dict[int, _Process] = {}
    for _ in range(_LOOKS):  # what was born in the meantime may have what its parent had, which may be gone
        fresh = [seen for seen in younger(pid, since) if seen.pid not in by_pid]
        by_pid.update((seen.pid, _look_at(seen)) for seen in fresh)
        if not fresh:
            break
    processes = by_pid.values()
    holders = {process.seen.pid for process in processes if not ends.isdisjoint(process.writes)}
    if not holders:
        return _Carriers(
            there=True
        )  # it may not be looked at, or is older: a daemon that was handed the pipe
    writers: dict[End, set[int]] = {}
    for process in processes:
        for end in process.writes:
            writers.setdefault(end, set()).add(process.seen.pid)
    feeders = {
        process.seen.pid: [writers.get(end, set()) for end in process.reads if end != source]
        for process in processes
        if process.seen.pid != shell
    }
    bound: set[int] = set()
    while more := {pid for pid, fed in feeders.items() if any(by <= bound for by in fed)} - bound:
        bound |= more
    if shell is None:
        itself = {process.seen.pid: process.itself for process in processes}
        others = {pid for pid, fed in feeders.items() if any(by - itself[pid] for by in fed)}
    else:
        others = {shell}
        while more := {pid for pid, fed in feeders.items() if any(by & others for by in fed)} - others:
            others |= more
        others.remove(shell)
        # Forked just now: it has both ends of the pipe that it is about to read, and is nobody's filter yet.
        others |= {pid for pid, fed in feeders.items() if {pid} in fed and by_pid[pid].seen.forked}
    if holders & bound:
        return _carriers([process.seen for process in processes], bound, bound_to_end=True)
    if holders & others:
        return _carriers([process.seen for process in processes], others, bound_to_end=False)
    return _Carriers()


def _carriers(all_seen: list[Seen], pids: set[int], *, bound_to_end: bool) -> _Carriers:
    """Describe these, and those who work for them."""
    while more := {seen.pid for seen in all_seen if seen.parent in pids} - pids:
        pids |= more
    found = [seen for seen in all_seen if seen.pid in pids]
    trace = frozenset((*seen.identity, _turns(seen.pid)) for seen in found)
    return _Carriers(True, bound_to_end, any(seen.working for seen in found), trace)


def _turns(pid: int) -> bytes:
    """Return how often a process was put on a processor, as the kernel says it; nothing where it does not."""
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as lines:
        return b"".join(line for line in lines if b"ctxt_switches" in line)
    return b""


def _look_at(seen: Seen) -> _Process:
    """Look until nothing has changed meanwhile: a shell moves its descriptors about before a program starts."""
    before: _Process | None = None
    for _ in range(_LOOKS):
        reads: set[End] = set()
        writes: set[End] = set()
        with suppress(OSError):  # it is gone, or somebody else's
            for name in os.listdir(f"/proc/{seen.pid}/fd"):
                with suppress(OSError):
                    _sort(seen.pid, name, reads, writes)
        found = _Process(seen, frozenset(reads), frozenset(writes))
        if found == before:
            break
        before = found
    return found


def _sort(pid: int, name: str, reads: set[End], writes: set[End]) -> None:
    """Find out what a descriptor of a process is, if it is a pipe or a terminal."""
    facts = os.stat(f"/proc/{pid}/fd/{name}")
    if stat.S_ISCHR(facts.st_mode):
        writes.add(_end(facts))
    elif stat.S_ISFIFO(facts.st_mode):
        with open(f"/proc/{pid}/fdinfo/{name}") as lines:
            flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
        if flags & os.O_ACCMODE != os.O_WRONLY:
            reads.add(_end(facts))
        if flags & os.O_ACCMODE != os.O_RDONLY:
            writes.add(_end(facts))


def _end(facts: os.stat_result) -> End:
    return (0, facts.st_rdev) if stat.S_ISCHR(facts.st_mode) else (facts.st_dev, facts.st_ino)
