"""One bash in a terminal, driven over pipes of its own.

Theory of operation. bash runs interactively, so ^C, ^Z, job control and errors behave as people know
them, but it never reads a command from the terminal: its PROMPT_COMMAND is a loop that reads commands
from one pipe, evaluates them at top level, and reports number, exit status, folder and exported
variables on another. Whatever throws bash out of the loop (^C, an unset variable) ends in the prompt,
which starts the loop again. So no command is too long for a terminal's line, none can be cut by a quote
that never closes, and what is typed reaches the running program and nothing else.

Where the loop cannot start again, because a command took away what it is made of (`enable -n builtin`, a DEBUG
trap that skips whatever comes), bash shows its prompt and would read a command. Its own standard input is empty,
so it ends instead, and a fresh one goes on in its place. The loop has the terminal as its own, until `exec <file`
gives the commands that follow another one; what throws bash out of the loop gives them the terminal again. A command
that is skipped succeeds: so the loop goes on only where one that fails has been carried out, too.

The last exit status is in `$?` when the next command begins: the two arms of an `if` see the status of its
condition, and unlike a plain command that fails, a condition sets off no ERR trap.

Its EXIT trap reports, too, and then does what the user's would; `trap` is a function that sees to it.

After each report a marker with a nonce is printed to the terminal: what came before it was said before
the command had ended. Commands run without the two descriptors of this machinery.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import termios
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agent_sdk.protocol.errors import ProcessNotFound
from agent_sdk.workspace.child_process import ChildProcess
from agent_sdk.workspace.disk import Folder
from agent_sdk.workspace.launch import Interpreter
from agent_sdk.workspace.pipes import (
    PipeReader,
    PipeWriter,
    Reading,
    end_of,
    make_plain,
    open_terminal,
    reading,
    take_trailing_output,
)
from agent_sdk.workspace.process_table import ProcessTable
from agent_sdk.workspace.process_tree import is_stopped

ROWS, COLS = 50, 200
INTERRUPT = b"\x03"

# In bash's own hands they move to low numbers, which stay valid when the limit on descriptors is lowered.
_HIGH = 200

_DRIVER = r"""
exec RC<&- </dev/null {__commands}<&COMMANDS COMMANDS<&- {__status}>&STATUS STATUS>&-
PS1='$ ' PS2=
unset HISTFILE
set +o history
__n=0 __operation=$AGENT_SERVER_OP
__report() {
  builtin printf 'NONCE %s %s %s %s\0' "$1" "$2" "$$" "$PWD" >&$__status || builtin return
  builtin declare -px >&$__status
  builtin printf '\0' >&$__status
}
__next() {
  __last=$1
  [[ ${PROMPT_COMMAND-} == "$__prompt" ]] || PROMPT_COMMAND=$__prompt
  builtin eval || builtin exit
  case $__n in "" | *[!0-9]*) builtin exit ;; esac
  __report "$__n" "$1" || builtin exit
  builtin printf '\033]133;D;NONCE;%s\007' "$__n" >TERMINAL
  builtin set +e
  builtin jobs >/dev/null
  builtin unset -n __command
  builtin unset -v __command
  __command=NONCE
  IFS= TMOUT= builtin read -r -d '' -u $__commands __command || builtin exit
  [[ $__command != NONCE ]] || : "${__nothing_was_read:?}"
  __n=$((__n + 1))
  builtin printf 'NONCE begin %s\0\0' "$__n" >&$__status
}
__keep() { builtin return "$__last"; }
__fail() { builtin return 1; }
__loop='while { __next "$?" && ! __fail; } 2>/dev/null; do
if { __keep; } 2>/dev/null
then builtin eval "$__command" {__commands}<&- {__status}>&-
else builtin eval "$__command" {__commands}<&- {__status}>&-
fi
done <TERMINAL; builtin eval "$__loop"'
__prompt='builtin eval "$__loop"'
PROMPT_COMMAND=$__prompt
__leave() {
  [[ $BASHPID != "$$" ]] || __report end "$1"
  builtin return "$1"
}
trap() {
  builtin trap "$@" || builtin return
  [[ $BASHPID == "$$" ]] || builtin return 0
  builtin local __own
  __own=$(builtin trap -p EXIT)
  [[ $__own != "trap -- 'if { __leave"* ]] || builtin return 0
  builtin eval "builtin set -- ${__own#trap -- }"
  builtin printf -v __own %q "${1-}"
  builtin trap "if { __leave \"\$?\"; } 2>/dev/null; then builtin eval $__own; else builtin eval $__own; fi" EXIT
}
trap - EXIT
readonly -f __report __next __keep __fail __leave
"""

_FACTS = re.compile(
    rb"begin (?P<begun>\d{1,9})|(end|(?P<number>\d{1,9})) (?P<exit_code>\d{1,3}) (?P<pid>\d{1,9}) (?P<cwd>.*)",
    re.DOTALL,
)
"""What bash says of itself, behind the nonce."""

# What programs ask a terminal, and what one without a screen answers; most wait for it without a limit.
_QUERIES = re.compile(rb"\x1b\[(?:6n|5n|0?c|>0?c)|\x1b\](?:10|11);\?(?:\x07|\x1b\\)")
_LONGEST_QUERY = 10


@dataclass(frozen=True)
class Report:
    """What bash said about itself."""

    number: int | None
    """Of the command that ended; None: bash itself ends."""
    exit_code: int
    cwd: bytes
    exported: bytes
    """Text that declares all exported variables when bash evaluates it."""


class Bash:
    """One bash in a terminal. `child` tells its end."""

    def __init__(
        self,
        processes: ProcessTable,
        folder: Folder,
        environment: Mapping[str, str],
        interpreter: Interpreter,
        take: Callable[[bytes], bool],
        on_report: Callable[[Report], None],
    ) -> None:
        """Start it; the first report (number 0) comes when it is ready.

        Args:
            processes: where it belongs.
            folder: where it starts; the descriptor stays the caller's.
            environment: what it starts with.
            interpreter: bash.
            take: gets what the terminal shows, as PipeReader says.
            on_report: called after a command's end, when its whole output was taken.
        """
        self._nonce = os.urandom(8).hex()
        self._take_output = take
        self._on_report = on_report
        self._sent = 0
        self._begun = 0
        self._pid = 0
        """Of bash itself; `child` is who keeps its terminal."""
        self._interrupts = False
        self._early: asyncio.Future[None] | None = None
        self._sending: asyncio.Task[None] | None = None
        self._reports: dict[int, Report] = {}
        self._last: Report | None = None
        self._marked = -1
        self._told = -1
        self._status = bytearray()
        self._terminal = open_terminal(ROWS, COLS)
        make_plain(self._terminal.slave)
        environment = {"TERM": "dumb", **environment, "COLUMNS": str(COLS), "LINES": str(ROWS)}
        status = self._spawn(processes, folder, environment, interpreter)
        self.child.on_death = self._died
        self._end = end_of(self._terminal.slave)
        self._telling: asyncio.Task[None] | None = None
        self._untold: Report | None = None
        self._typed = PipeWriter(os.dup(self._terminal.master))
        self.reader = PipeReader(self._terminal.master, _Filter(self._nonce, self._shown, self._mark).take)
        self._status_reader = PipeReader(status, self._take_status)

    def _spawn(
        self,
        processes: ProcessTable,
        folder: Folder,
        environment: Mapping[str, str],
        interpreter: Interpreter,
    ) -> int:
        """Start bash with its three pipes; returns the reading end of the status pipe."""
        fds = [_high(fd) for _ in range(3) for fd in os.pipe()]
        command_in, command_out, status_in, status_out, rc_in, rc_out = fds
        theirs = (command_in, status_out, rc_in)
        driver = _DRIVER.replace("NONCE", self._nonce).replace("COMMANDS", str(command_in))
        driver = (
            driver.replace("STATUS", str(status_out))
            .replace("RC<", f"{rc_in}<")
            .replace("TERMINAL", self._terminal.name)
        )
        os.write(rc_out, driver.encode())
        arguments = (b"--noprofile", b"--rcfile", f"/dev/fd/{rc_in}".encode(), b"--noediting", b"-i")
        launch = interpreter.launch(arguments, environment, self._terminal.name, theirs)
        try:
            self.child: ChildProcess = processes.spawn(launch, folder)
        except BaseException:
            for fd in (*fds, self._terminal.master, self._terminal.slave):
                os.close(fd)
            raise
        self._source = end_of(command_in)
        for fd in (*theirs, rc_out):
            os.close(fd)
        self._commands = PipeWriter(command_out)
        return status_in

    def run(self, command: bytes) -> int:
        """Hand over a command; returns its number. The one before has to be over.

        Raises:
            ProcessNotFound: bash has ended.
        """
        if self._commands.open:
            with suppress(OSError, termios.error):  # it hangs up at this moment
                make_plain(self._terminal.slave)
                self._terminal.discard_input()
        data = command + b"\0"
        rest = data[self._commands.write_now(data) :]
        self._sent += 1
        self._interrupts = False
        if rest:
            self._sending = asyncio.get_running_loop().create_task(self._send(rest))
        return self._sent

    async def _send(self, rest: bytes) -> None:
        with suppress(ProcessNotFound):
            await self._commands.write(rest)

    def interrupt(self) -> None:
        """Press ^C, as soon as the command has begun: earlier it would hit bash in the middle of reading it."""
        if self._begun < self._sent:
            self._interrupts = True
        else:
            self._type_now(INTERRUPT)

    async def type(self, data: bytes, enter: bool | None = False) -> None:
        """Type, once the command has begun; waits while nobody reads. For `enter` see Shell.send.

        Raises:
            ProcessNotFound: bash has ended.
        """
        while self._begun < self._sent:
            if self._early is None:
                self._early = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._early, self.child.over), return_when=asyncio.FIRST_COMPLETED)
            if self.child.over.done():
                raise ProcessNotFound("the shell has ended")
        with suppress(termios.error):  # it hangs up at this moment
            reads = reading(self._terminal.slave)
            if enter or (enter is None and _wants_enter(data, reads)):
                data += b"\n" if reads == "lines" else b"\r"
        await self._typed.write(data)

    def _type_now(self, data: bytes) -> None:
        with suppress(ProcessNotFound):
            self._typed.write_now(data)

    def is_gone(self) -> bool:
        """Return whether it has ended, also when that is not known here yet: who keeps its terminal tells it later."""
        if self.child.alive and self._pid > 0:
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:  # it is another user's by now, as after sudo
                return False
        return not self.child.alive

    def go_on(self) -> bool:
        """Have it go on if it was stopped (`kill -STOP $$`), as nobody else could; returns whether it was."""
        stopped = self._pid > 0 and is_stopped(self._pid)
        if stopped:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGCONT)
        return stopped

    def close(self) -> None:
        """Close all descriptors; it has to be ended already."""
        self._terminal.close_slave()
        for part in (self._typed, self.reader, self._commands, self._status_reader):
            part.close()

    # --- what comes back ---

    def _died(self) -> Coroutine[Any, Any, None] | None:
        self._status_reader.drain()
        self.reader.drain()
        self._terminal.close_slave()
        self.reader.drain()
        self._tell_now()
        if self._last is not None:
            self._on_report(self._last)
        self._typed.close()
        self._commands.close()
        return self._trailing_output() if self.reader.open else None

    async def _trailing_output(self, *, lives_on: bool = False) -> None:
        child = self.child
        who = self._pid if lives_on else None
        ends, source = {self._end}, self._source
        await take_trailing_output((self.reader,), ends, child.pid, child.since, source=source, lives_on=who)

    def _shown(self, data: bytes, queries: bytes) -> bool:
        if self._marked < 0:
            return True  # it is still starting
        if queries and self._marked < self._sent:
            self._type_now(queries)
        return self._take_output(data) if data else True

    def _mark(self, number: int) -> None:
        self._marked = max(self._marked, number)
        self._tell()

    def _take_status(self, data: bytes) -> bool:
        self._status += data
        start = f"{self._nonce} ".encode()
        while (found := self._status.find(start)) >= 0:
            parts = bytes(self._status[found + len(start) :]).split(b"\0", 2)
            # ^C can cut a report short; the next one follows in the middle of it.
            again = self._status.find(start, found + 1)
            if len(parts) < 3 or (again >= 0 and again - found < len(start) + len(parts[0]) + len(parts[1])):
                if again < 0:
                    break
                del self._status[:again]
                continue
            del self._status[: found + len(start) + len(parts[0]) + len(parts[1]) + 2]
            self._note(parts[0], parts[1])
        return True

    def _note(self, facts: bytes, exported: bytes) -> None:
        found = _FACTS.fullmatch(facts)
        number = int((found and (found["number"] or found["begun"])) or 0)
        if found is None or number > self._sent:
            return  # a command wrote it, to the descriptor that it may find
        if found["begun"]:
            self._began(number)
            return
        self._pid = self._pid or int(found["pid"])  # the first one is its own: no command has run yet
        is_last = found["number"] is None
        report = Report(None if is_last else number, int(found["exit_code"]), found["cwd"], exported)
        if is_last:
            self._last = report
        else:
            self._reports[number] = report
            self._tell()

    def _began(self, number: int) -> None:
        self._begun = number
        if self._interrupts:
            self._interrupts = False
            self._type_now(INTERRUPT)
        early, self._early = self._early, None
        if early is not None:
            early.set_result(None)

    def _tell(self) -> None:
        """Pass on the reports whose markers have been seen, once all has come that went through a filter."""
        for number in sorted(self._reports):
            if number <= self._marked:
                report = self._reports.pop(number)
                if number > self._told:
                    self._told = number
                    self._untold = report  # a newer one says more
                    if self._telling is not None:
                        self._telling.cancel()
                    self._telling = asyncio.get_running_loop().create_task(self._tell_later(report))

    async def _tell_later(self, report: Report) -> None:
        await self._trailing_output(lives_on=True)
        # What it took at last may have held the marker of a newer one, whose output is waited for anew.
        if self._untold is report:
            self._tell_now()

    def _tell_now(self) -> None:
        report, self._untold = self._untold, None
        if report is not None:
            self._on_report(report)


class _Filter:
    """Takes the markers out of what a terminal shows, and answers what programs ask it."""

    def __init__(
        self, nonce: str, shown: Callable[[bytes, bytes], bool], marked: Callable[[int], None]
    ) -> None:
        self._start = f"\x1b]133;D;{nonce};".encode()
        # Whatever else follows is shown: it is what a program printed.
        self._marker = re.compile(re.escape(self._start) + rb"(\d{1,18})\x07")
        self._incomplete = re.compile(re.escape(self._start) + rb"\d{0,18}")
        self._shown = shown
        self._marked = marked
        self._held = b""
        self._before = b""

    def take(self, data: bytes) -> bool:
        data = self._held + data
        more, begin = True, 0
        for marker in self._marker.finditer(data):
            more = self._show(data[begin : marker.start()]) and more
            self._marked(int(marker[1]))
            begin = marker.end()
        end = data.rfind(b"\x1b", begin)
        if end < 0 or not self._may_become_marker(data[end:]):
            end = len(data)
        self._held = data[end:]
        return self._show(data[begin:end]) and more

    def _may_become_marker(self, data: bytes) -> bool:
        return self._start.startswith(data) or self._incomplete.fullmatch(data) is not None

    def _show(self, data: bytes) -> bool:
        answers = b""
        text = self._before + data
        if b"\x1b" in text:
            for query in _QUERIES.finditer(text):
                if query.end() > len(self._before):
                    answers += _answer_to(query[0])
        self._before = text[-_LONGEST_QUERY:]
        return self._shown(data, answers)


def _wants_enter(data: bytes, reads: Reading) -> bool:
    if not data or data.endswith((b"\n", b"\r")):
        return False
    return reads == "lines" or (reads == "edited" and len(data.decode(errors="replace")) > 1)


def _answer_to(query: bytes) -> bytes:
    match query[:3]:
        case b"\x1b[6":
            return b"\x1b[1;1R"
        case b"\x1b[5":
            return b"\x1b[0n"
        case b"\x1b[>":
            return b"\x1b[>0;0;0c"
        case b"\x1b]1":
            return query[:4] + b";rgb:0000/0000/0000" + query[6:]
    return b"\x1b[?1;2c"


def _high(fd: int) -> int:
    """Return the descriptor under a high number, where no script expects to find one free."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    except OSError:  # the limit on descriptors is lower
        return fd
    os.close(fd)
    return high


def restoring(report: Report) -> bytes:
    """Return the command that gives a fresh bash the folder and the exported variables of a report."""
    folder = report.cwd.replace(b"'", b"'\\''")
    lines = (
        report.exported,
        b"builtin declare -x AGENT_SERVER_OP=$__operation",
        b"builtin cd -- '" + folder + b"'",
    )
    return b"{\n" + b"\n".join(lines) + b"\n} 2>/dev/null"
