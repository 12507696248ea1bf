"""Persistent shells: what one call types, when it is answered, and what it is answered with."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from agent_sdk.protocol.errors import AgentServerError, ProcessNotFound
from agent_sdk.workspace.bash import Bash, Report, restoring
from agent_sdk.workspace.contract import Shell
from agent_sdk.workspace.environment import encode
from agent_sdk.workspace.limits import Counts, LimitWatch
from agent_sdk.workspace.output import TAIL_BYTES, Output, ShellResult
from agent_sdk.workspace.process_table import SPOOL_KEPT_BYTES
from agent_sdk.workspace.spool import Spool

OUTPUT_IN_MEMORY = 24_000
"""Longer outputs are in a file, too, because whoever reads the answer may not want all of it."""
FILES_KEPT = 32
_PRESSES = 3
_PATIENCE_SECONDS = 0.3

Status = Literal["done", "quiet", "timeout", "busy", "ended", "said"]
StartBash = Callable[[Callable[[bytes], bool], Callable[[Report], None]], Bash]


class LocalShell(Shell):
    """Implements `workspace.Shell`."""

    def __init__(
        self, name: str, spool_folder: str, start_bash: StartBash, limits: LimitWatch | None = None
    ) -> None:
        """Describe it; bash starts at the first use."""
        self._name = name
        self._spool_folder = spool_folder
        self._start_bash = start_bash
        self._limits = limits
        self._counts = Counts()
        """How often limits were run into when the command began."""
        self._starting = asyncio.Lock()
        self._bash: Bash | None = None
        self._report: Report | None = None
        """The last one: folder and variables for the next bash."""
        self._restoring: int | None = None
        self._command: int | None = None
        """The number of the command that runs, as far as we know."""
        self._exit_code: int | None = None
        self._spool: Spool | None = None
        self._answered = 0
        self._files: deque[Spool] = deque()
        self._count = 0
        self._heard = 0.0
        self._waiters: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        state = "not started" if self._bash is None else "idle" if self._command is None else "busy"
        return f"<LocalShell {self._name} {state}>"

    @property
    def is_open(self) -> bool:
        """Whether its bash runs."""
        return self._bash is not None and not self._bash.child.over.done()

    async def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        until: bytes | None = None,
        op_id: str | None = None,
    ) -> ShellResult:
        text = encode(command, "command")
        sought = _Sought(until)
        bash = await self._ready()
        if self._command is not None:
            bash.go_on()
            return await self._answer("busy")
        dropped = self._turn_page()
        self._exit_code = None
        if self._limits is not None:
            self._counts = self._limits.look()
        try:
            self._command = bash.run(text)
        except ProcessNotFound:  # it ended just now, as the answer says
            await asyncio.wait((bash.child.over,))
        try:
            for spool in dropped:
                await spool.close()
            return await self._wait(bash, timeout, quiet, sought)
        except asyncio.CancelledError:
            await self._interrupt(bash)
            raise

    async def send(
        self,
        data: bytes,
        *,
        enter: bool | None = False,
        timeout: float | None = None,
        quiet: float | None = 30.0,
        until: bytes | None = None,
        op_id: str | None = None,
    ) -> ShellResult:
        """Type into the running command. When none runs, nothing is typed and the answer is `done`."""
        sought = _Sought(until)
        bash = await self._ready()
        if self._command is None:
            return await self._answer("done")
        typing = asyncio.ensure_future(_type(bash, data, enter))
        try:
            return await self._wait(bash, timeout, quiet, sought)
        finally:
            typing.cancel()
            with suppress(asyncio.CancelledError):
                await typing

    async def reset(self, *, op_id: str | None = None) -> None:
        async with self._starting:
            await self._end()
            self._begin()
            self._wake()

    async def close(self, *, op_id: str | None = None) -> None:
        """End the shell and forget it; the files of its long outputs are removed."""
        async with self._starting:
            await self._end()
            self._wake()
            spools = (*self._files, *((self._spool,) if self._spool is not None else ()))
            self._files.clear()
            self._spool, self._answered = None, 0
            for spool in spools:
                await spool.close()

    async def _end(self) -> None:
        bash, self._bash = self._bash, None
        self._report = self._command = self._exit_code = None
        if bash is not None:
            if not bash.child.over.done():
                bash.child.end(hang_up=True)
                await bash.child.ended()
            bash.close()
        if self._spool is not None:
            self._answered = self._spool.size

    # --- bash ---

    async def _ready(self) -> Bash:
        async with self._starting:
            if self._bash is not None and self._bash.is_gone():
                await asyncio.wait((self._bash.child.over,))
            return self._renewed()

    def _renewed(self) -> Bash:
        """Return a bash that runs: the present one, or a fresh one where the ended one left off."""
        bash = self._bash
        if bash is not None and not bash.child.over.done():
            return bash
        last = self._report
        if bash is not None:
            bash.close()
        fresh = self._begin()
        if bash is not None and last is not None:
            self._restoring = fresh.run(restoring(last))
        return fresh

    def _begin(self) -> Bash:
        if self._spool is None:
            self._turn_page()
        bash = self._bash = self._start_bash(self._take, self._heard_from)
        self._resume_with(bash)
        self._command = self._restoring = None
        bash.child.over.add_done_callback(lambda _: self._wake())
        return bash

    def _resume_with(self, bash: Bash) -> None:
        if self._spool is not None:
            self._spool.on_room = bash.reader.resume

    def _heard_from(self, report: Report) -> None:
        self._report = report
        if report.number is None or report.number == self._restoring:
            return
        if report.number == self._command:
            self._command = None
            self._exit_code = report.exit_code
            self._wake()

    def _take(self, data: bytes) -> bool:
        self._heard = time.monotonic()
        spool = self._spool
        if spool is None:
            return True
        spool.feed(data)
        self._wake()
        return not spool.full

    async def _interrupt(self, bash: Bash) -> None:
        """Press ^C and give the command a moment to end, so that the next one finds the shell free.

        A key pressed while a program is just being started reaches the shell and not the program, so it
        is pressed more than once.
        """
        with suppress(asyncio.CancelledError):
            for _ in range(_PRESSES):
                bash.interrupt()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_SECONDS):
                        while self._command is not None and not bash.child.over.done():
                            await self._change(None)
                        return

    # --- answers ---

    async def _wait(
        self, bash: Bash, timeout: float | None, quiet: float | None, sought: _Sought
    ) -> ShellResult:
        began = time.monotonic()
        while True:
            if bash.child.over.done():
                return await self._ended(bash)
            if self._command is None:
                return await self._answer("done")
            if self._spool is not None and await sought.is_in(self._spool, self._answered):
                return await self._answer("said")
            now = time.monotonic()
            left_quiet = None if quiet is None else max(began, self._heard) + quiet - now
            left = None if timeout is None else began + timeout - now
            if left is not None and left <= 0:
                bash.go_on()
                return await self._answer("timeout")
            if left_quiet is not None and left_quiet <= 0:
                if bash.go_on():
                    began = now
                    continue
                return await self._answer("quiet")
            await self._change(min((each for each in (left, left_quiet) if each is not None), default=None))

    async def _ended(self, bash: Bash) -> ShellResult:
        self._exit_code = bash.child.over.result().exit_code
        result = await self._answer("ended")
        async with self._starting:
            if self._bash is bash:  # or a reset has been faster
                with suppress(AgentServerError):  # what stands in its way shows at the next use
                    self._renewed()
        return result

    async def _answer(self, status: Status) -> ShellResult:
        output, path, lacks = Output(), None, 0
        spool = self._spool
        if spool is not None:
            start = self._answered
            output = await spool.output(start)
            self._answered = start + output.size  # only now: a cancelled answer has told nobody
            if spool.has_file:
                lacks = await spool.settle(final=False)
                path = spool.path
        over = status in ("done", "ended")
        return ShellResult(
            status=status,
            output=output,
            exit_code=self._exit_code if over else None,
            reason=self._limits.why(self._counts, self._exit_code) if over and self._limits else "",
            cwd="" if self._report is None else self._report.cwd.decode("utf-8", "backslashreplace"),
            full_output=path,
            full_output_lacks=lacks,
        )

    def _turn_page(self) -> list[Spool]:
        """Begin a new file for a new command, unless something in the present one was never shown.

        Returns the oldest files where too many are kept; they have to be closed.
        """
        old = self._spool
        if old is not None and old.size > self._answered:
            return []
        if old is not None:
            self._files.append(old)
        self._count += 1
        path = os.path.join(self._spool_folder, f"shell-{self._name}-{self._count}.out")
        self._spool = Spool(path, memory=OUTPUT_IN_MEMORY)
        self._answered = 0
        if self._bash is not None:
            self._resume_with(self._bash)
        dropped: list[Spool] = []
        while len(self._files) > FILES_KEPT or sum(f.on_disk for f in self._files) > SPOOL_KEPT_BYTES:
            dropped.append(self._files.popleft())
        return dropped

    async def _change(self, seconds: float | None) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait((waiter,), timeout=seconds)
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Sought:
    """What a caller waits for in the output; each byte is looked at once."""

    def __init__(self, text: bytes | None) -> None:
        self._text = text
        self._from = 0
        self._seen = b""
        """The end of what was looked at: the beginning of the text may be there."""

    async def is_in(self, spool: Spool, since: int) -> bool:
        """Whether it has come since this offset."""
        if self._text is None:
            return False
        if self._from < since:
            self._from, self._seen = since, b""
        while True:
            found, data = await spool.read(self._from, TAIL_BYTES)
            if not data:
                return False
            seen = self._seen + data if found == self._from else data
            self._from = found + len(data)
            self._seen = seen[max(0, len(seen) - len(self._text) + 1) :]
            if self._text in seen:
                return True


async def _type(bash: Bash, data: bytes, enter: bool | None) -> None:
    with suppress(ProcessNotFound):
        await bash.type(data, enter)
