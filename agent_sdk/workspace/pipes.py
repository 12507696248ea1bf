"""The pipes and terminals of a process, read and written without blocking the loop, and when what came is whole.

Two kinds of processes can have the pipes of a command open after its end. A filter that it wrote through
(`exec > >(tee log)`, `cmd > >(cat)`) has a part of its output in its hands: that is waited for. A child in the
background (`sleep 100 &`) lives a life of its own, and nobody waits for it. A filter is one that reads a pipe;
it is bound to end once nobody has that pipe's writing end any more.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import struct
import termios
from collections.abc import Callable, Collection, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from agent_sdk.protocol.errors import InvalidParams, ProcessNotFound
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.process_tree import Seen, younger

SMALLEST_READ, LARGEST_READ = 64 << 10, 1 << 20
Reading = Literal["lines", "keys", "edited"]
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


class PipeReader:
    """Reads from a process whenever something comes, at most 1 MiB per turn of the loop. It owns the descriptor."""

    def __init__(self, fd: int, take: Callable[[bytes], bool]) -> None:
        """Start reading.

        Args:
            fd: the reading end of a pipe, or the master of a terminal.
            take: gets each piece; returns whether it wants more now (else `resume` has to be called).
        """
        self._fd = fd
        self._take = take
        self._amount = SMALLEST_READ
        self._listening = False
        self._loop = asyncio.get_running_loop()
        self.heard = self._loop.time()
        """When something came last, on the loop's clock."""
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when nobody can write to it any more, or when it was closed."""
        os.set_blocking(fd, False)
        self.resume()

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self._fd >= 0

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`, and cannot know what there is to read."""
        return self.open and not self._listening

    def resume(self) -> None:
        """Read on after `take` had enough."""
        if self._fd >= 0 and not self._listening:
            self._loop.add_reader(self._fd, self._ready)
            self._listening = True

    def drain(self, limit: int = LARGEST_READ) -> None:
        """Take what is there at this moment, up to `limit` bytes, whether it is wanted or not."""
        while self._fd >= 0 and limit > 0:
            data = self._read()
            if not data:
                return
            limit -= len(data)
            self._take(data)

    def close(self) -> None:
        """Stop; harmless when repeated."""
        self._pause()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if not self.ended.done():
            self.ended.set_result(None)

    def _ready(self) -> None:
        data = self._read()
        if data and not self._take(data):
            self._pause()

    def _pause(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._fd)
            self._listening = False

    def _read(self) -> bytes:
        """Return what is there; nothing when there is nothing now, and after closing at the end."""
        try:
            data = os.read(self._fd, self._amount)
        except BlockingIOError:
            return b""
        except OSError:  # a terminal without writers says EIO
            data = b""
        if not data:
            self.close()
            return b""
        self.heard = self._loop.time()
        if len(data) == self._amount:
            self._widen()
        return data

    def _widen(self) -> None:
        """Whoever fills a whole read writes much: fewer, larger reads, and a wider pipe."""
        if self._amount < LARGEST_READ:
            self._amount = min(LARGEST_READ, self._amount * 4)
            # It fails on a terminal, and when the user's share of pipe memory is used up.
            with suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, LARGEST_READ)


class PipeWriter:
    """Writes to a process, however long that does not read. It owns the descriptor."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`: the writing end of a pipe, or the master of a terminal."""
        os.set_blocking(fd, False)
        self._fd = fd
        self._turn = asyncio.Lock()
        self._room: asyncio.Future[None] | None = None
        self.taken = 0
        """Bytes that went in so far."""

    @property
    def open(self) -> bool:
        """Whether it can still be written to."""
        return self._fd >= 0

    async def write(self, data: bytes) -> None:
        """Write all of it, after what others began to write; cancelling leaves the rest unwritten.

        Raises:
            ProcessNotFound: nobody can read it any more.
        """
        async with self._turn:
            await self._write(memoryview(data))

    async def write_last(self, data: bytes) -> None:
        """Write all of it, as far as somebody reads, and close."""
        with suppress(ProcessNotFound):
            await self.write(data)
        self.close()

    async def write_at(self, offset: int, data: bytes) -> None:
        """Like `write`, for bytes that belong at `offset` of all the input: what went in already is left out.

        Raises:
            ProcessNotFound: nobody can read it any more.
            InvalidParams: bytes before `offset` are missing.
        """
        async with self._turn:
            if offset > self.taken:
                raise InvalidParams(
                    f"$.params.since: the process got {self.taken} bytes so far, and these begin at {offset}"
                )
            await self._write(memoryview(data)[self.taken - offset :])

    async def _write(self, view: memoryview) -> None:
        while True:
            view = view[self.write_now(view) :]
            if not view:
                return
            await self._wait_for_room()

    def write_now(self, data: bytes | memoryview) -> int:
        """Write what fits at this moment; returns how much that was.

        Raises:
            ProcessNotFound: nobody can read it any more.
        """
        if self._fd < 0:
            raise ProcessNotFound("the process has ended or closed its input")
        try:
            taken = os.write(self._fd, data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:  # EPIPE; EIO from a terminal
            self.close()
            raise ProcessNotFound("the process has ended or closed its input") from None
        self.taken += taken
        return taken

    async def _wait_for_room(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._fd
        room = self._room = loop.create_future()
        loop.add_writer(fd, _settle, room)
        try:
            await room
        finally:
            self._room = None
            if self._fd == fd:
                loop.remove_writer(fd)

    def close(self) -> None:
        """Close it; whoever waits for room learns it. Harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self._room is not None:
                asyncio.get_running_loop().remove_writer(fd)
                _settle(self._room)
            os.close(fd)


def _settle(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)


@dataclass
class Terminal:
    """The side of a terminal where a person would sit (`master`), and its other side."""

    master: int
    slave: int
    name: str
    """Path of the other side."""

    def discard_input(self) -> None:
        """Drop what was typed and not read."""
        termios.tcflush(self.slave, termios.TCIFLUSH)

    def close_slave(self) -> None:
        """Let the master see the end once no process has the other side open. Harmless when repeated."""
        slave, self.slave = self.slave, -1
        if slave >= 0:
            os.close(slave)


def open_terminal(rows: int, cols: int) -> Terminal:
    """Open a terminal; both descriptors are the caller's.

    The other side stays open here as well: a master whose other side nobody has open yet reads as ended.
    """
    master, slave = os.openpty()
    resize(master, rows, cols)
    return Terminal(master, slave, os.ttyname(slave))


def resize(master: int, rows: int, cols: int) -> None:
    """Set the size in characters; the programs on the terminal get WINCH."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def reading(fd: int) -> Reading:
    """Return how the program on a terminal reads: `lines`, single `keys`, or keys of a line that is `edited`.

    Who edits a line (or a whole screen) takes Enter as the key that it is; who asks for a key (`read -n1`) does not.
    """
    modes = termios.tcgetattr(fd)
    if modes[3] & termios.ICANON:
        return "lines"
    return "keys" if modes[0] & termios.ICRNL else "edited"


def make_plain(fd: int) -> None:
    """Have bytes pass as they are: no echo of what is typed, no carriage return before a newline.

    Keys keep their meaning (^C interrupts, ^D ends the input).
    """
    modes = termios.tcgetattr(fd)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~(termios.ECHO | termios.ECHONL)
    modes[3] |= termios.ICANON | termios.ISIG
    modes[0] |= termios.ICRNL
    termios.tcsetattr(fd, termios.TCSANOW, modes)


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
    before, checked = _Carriers(), loop.time()
    # Of their time: while the machine stands still, or we are starved, nobody has had the time that passed.
    waited = quiet = 0.0
    while listening := [reader for reader in readers if reader.open]:
        try:
            carriers = await in_thread(_look, ends, pid, since, source, lives_on)
        except OSError:  # no descriptor is left to look with
            break
        if any(reader.paused or reader.heard >= checked for reader in listening):
            quiet = 0.0
        checked = loop.time()
        working = carriers.working or carriers.trace != before.trace
        if carriers.bound_to_end:
            patience = (_WORK_SECONDS if working else _SLEEP_SECONDS) - quiet
        else:
            patience = _UNCERTAIN_SECONDS - waited
            patience = patience if working else min(patience, QUIET_SECONDS - quiet)
        if not carriers.there or patience <= 0:
            break
        before = carriers
        await asyncio.wait([reader.ended for reader in listening], timeout=min(patience, QUIET_SECONDS))
        passed = min(loop.time() - checked, QUIET_SECONDS)
        waited, quiet = waited + passed, quiet + passed
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
