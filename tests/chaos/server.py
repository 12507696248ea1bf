"""The server as its users start it, on one port and one data folder for its many lives, and the signals that hit it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from agent_sdk.log.event_log import EventLog
from tests.chaos.history import Entry, Final, Logs

KEY = "chaos-key-0123456789abcdef"
BOXES = {"boxes_on_stop": "end", "box_linger_seconds": 300}
START_SECONDS = 40
END_SECONDS = 40
LONGEST_LINE = 1 << 20
PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to those who connect: while the server is down nobody connects to himself."""


class Server:
    """See the module's docstring. Leaving ends the present life with SIGKILL, and everything it left behind."""

    def __init__(
        self,
        folder: Path,
        *,
        data: Path | None = None,
        mutant: str = "",
        host: str = "127.0.0.1",
        **options: object,
    ) -> None:
        """Describe it: `options` are those of the configuration, `mutant` one of tests.chaos.broken."""
        self.folder = folder
        self.data = data or folder / "data"
        self.host = host
        self.port = free_port()
        self.pid = 0
        self.lives = 0
        self.up = asyncio.Event()
        """Set while it accepts connections."""
        self._mutant = mutant
        self._options = {"log_level": "debug", "log_format": "json", **BOXES, **options}
        self._process: asyncio.subprocess.Process | None = None
        self._ending: asyncio.Task[int] | None = None
        self._temporary = folder / "tmp"
        self._log: list[bytes] = []
        self._told = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._temporary.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()
        while left := self.remains():
            await asyncio.gather(*(killed(process.pid) for process in left))

    async def start(self, *prefix: str, **environment: str) -> bool:
        """Begin a life, under the command `prefix`; returns whether it came to accept connections."""
        assert self._process is None, "it lives"
        self.lives += 1
        process = await asyncio.create_subprocess_exec(
            *prefix,
            *self._command(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            env={**os.environ, **self._environment(), **environment},
            start_new_session=True,
        )
        self._process = process
        self._ending = asyncio.create_task(self._watch(process))
        async with asyncio.timeout(START_SECONDS):
            line = await process.stdout.readline()
        if line:
            self.pid = json.loads(line)["pid"]
            if process.returncode is None:
                self.up.set()
        return bool(line)

    async def ended(self) -> int:
        """Wait for the end of this life; returns the exit code, negative for a signal."""
        async with asyncio.timeout(END_SECONDS):
            code = await asyncio.shield(self._ending)
        self._process = None
        return code

    def signal(self, number: signal.Signals) -> None:
        """Hit it; nothing happens when it is dead already."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def kill(self) -> None:
        """End this life at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self.ended()

    async def stop(self) -> int:
        """End this life as a shutdown does; returns the exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def restart(self) -> None:
        """Kill it, if it lives, and begin the next life."""
        await self.kill()
        assert await self.start(), "the server did not start; see server.log"

    async def said(self, event: str, **fields: object) -> None:
        """Wait until its log tells of this."""
        async with asyncio.timeout(END_SECONDS), self._told:
            await self._told.wait_for(lambda: any(_fits(line, event, fields) for line in self._log))

    def remains(self) -> list[psutil.Process]:
        """Every living process that descends from any of its lives, the present server included."""
        mark = f"TMPDIR={self._temporary}\0".encode()
        return [process for process in processes() if mark in environ(process)]

    def boxes(self) -> list[psutil.Process]:
        """The living boxes of all its lives."""
        return [process for process in self.remains() if "agent_sdk.box" in cmdline(process)]

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        with (self.folder / "server.log").open("ab") as file:
            async for line in process.stderr:
                file.write(line)
                self._log.append(line)
                async with self._told:
                    self._told.notify_all()
        code = await process.wait()
        self.up.clear()
        return code

    def _command(self) -> list[str]:
        module = "tests.chaos.broken" if self._mutant else "agent_server"
        where = ["--host", self.host, "--port", str(self.port), "--data", str(self.data)]
        return [sys.executable, "-m", module, "serve", "--json", *where]

    def _environment(self) -> dict[str, str]:
        given = {f"AGENT_SERVER_{name.upper()}": str(value) for name, value in self._options.items()}
        return {
            **given,
            "AGENT_SERVER_API_KEY": KEY,
            "TMPDIR": str(self._temporary),
            "PYTHONPATH": str(Path(__file__).parent.parent.parent),
            "CHAOS_MUTANT": self._mutant,
        }


def _fits(line: bytes, event: str, fields: dict[str, object]) -> bool:
    if f'"event": "{event}"'.encode() not in line:
        return False
    said = json.loads(line)
    return all(said.get(name) == value for name, value in fields.items())


def free_port(choice: random.Random | None = None) -> int:
    """A port of the loopback that nobody listens on."""
    for port in (choice or random.Random()).sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


async def final_logs(path: Path) -> Logs:
    """What a log has, read by the product's own reader after the server has ended."""
    async with EventLog.open(path) as log:
        return {
            row.id: Final(row.epoch, [entry async for entry in _entries(log, row.id)])
            for row in await log.list()
        }


async def _entries(log: EventLog, conversation: str):
    after = 0
    while page := await log.read(conversation, after):
        for seq, body in page:
            yield Entry(seq, bytes(body))
            after = seq


def processes() -> Iterator[psutil.Process]:
    """All processes of this machine but zombies."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process


def environ(process: psutil.Process) -> bytes:
    """The environment a process was started with; empty when it is gone."""
    try:
        return Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return b""


def cmdline(process: psutil.Process) -> Sequence[str]:
    """Its command; empty when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return ()


async def killed(pid: int) -> None:
    """Kill a process and wait until it is gone: for a while it is there and can be seen."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            await asyncio.to_thread(select.select, [descriptor], [], [], END_SECONDS)
        finally:
            os.close(descriptor)
