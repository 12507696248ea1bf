"""Processes of this machine as a backend, for where there is no container engine: agent servers, and boxes.

A machine has a folder: `machine.json` says what it is to be and is written before anything is started, `process.json`
which process it is, `server.log` is its standard error, and `data` is what it stores. Its name stands in its
environment, so it is found even when nobody came to write down its number. A server listens on the loopback, on a port
that the kernel chooses. Image, user, processors and memory are not looked at: it runs what runs here, as this user; and
nothing of a hardening is in force. The variables of a server are the commands', whatever command it was to run.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct

import agent_sdk
from agent_sdk.cancellation import to_its_end
from agent_sdk.protocol.errors import InvalidParams, NotFound, WorkspaceUnavailable
from agent_sdk.protocol.results import Usage
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.environment import packed
from agent_sdk.workspace.process_tree import Tree, end_tree
from workspaces.backend.contract import (
    Backend,
    Can,
    Ending,
    Facts,
    Found,
    Image,
    Look,
    Machine,
    OnProgress,
    Pull,
    State,
    one_line,
)
from workspaces.backend.labels import has
from workspaces.backend.records import Child, Identity, first_line, last_lines, read_record, write_record

MARKER = "AGENT_RUNTIME"
MACHINE, PROCESS, LOG, DATA = "machine.json", "process.json", "server.log", "data"
START_SECONDS = 3600.0
"""At most; whoever starts one has a limit of his own, and words for it."""
PAUSE_SECONDS = 15.0
"""Longer than a server may take that is told to drain for 5 s."""
LONGEST_LINE = 64 << 10
OPTION = "AGENT_SERVER_"
"""Begins the name of every variable that is an option of the server."""
OPTIONS = {
    "AGENT_SERVER_BOXES_ON_STOP": "end",
    "AGENT_SERVER_DRAIN_SECONDS": "5",
    "AGENT_SERVER_LOG_FORMAT": "json",
}


class Record(Struct, frozen=True):
    """Where a server is that was ready."""

    identity: Identity
    url: str


class _Ready(Struct):
    url: str


class ProcessBackend(Backend):
    """Machines that are processes. Entering takes nothing, leaving lets go of all: they go on."""

    can: frozenset[Can] = frozenset()
    cpus = memory = 0
    root_limit = unseen = ""
    own_kernels: frozenset[str] = frozenset()

    def __init__(
        self,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        prefix: str = "",
        end_rest: Callable[[Path], Awaitable[None]] | None = None,
    ) -> None:
        """Say where they are kept.

        Args:
            folder: has the folder of each of them; it must exist.
            environment: what all of them know of the environment.
            prefix: what their names begin with, and the names of their folders do not.
            end_rest: called with the `data` of one that has ended, and ends what it may have left running.
        """
        self._folder = folder
        self._environment = dict(environment or {})
        self._prefix = prefix
        self._end_rest = end_rest
        self._children: dict[str, Child] = {}
        self._queues: set[asyncio.Queue[Found]] = set()
        """Of whoever is told of changes."""

    def __repr__(self) -> str:
        return f"<ProcessBackend in {self._folder}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for child in self._children.values():
            child.let_go()
        self._children.clear()

    def check_runtime(self, name: str) -> None:
        pass

    async def image(self, name: str, *, pull: Pull = "missing", platform: str | None = None) -> Image:
        return Image(name=name, id=name)

    @asynccontextmanager
    async def looking(self, image: Image) -> AsyncIterator[Look]:
        async def look(path: str, most: int) -> tuple[str, bytes]:
            raise NotFound(f"a process has no image, and so no {path}")

        yield look

    # --- its start ---

    async def create(self, machine: Machine, on_progress: OnProgress | None = None) -> str:
        await in_thread(self._write_down, machine)
        self._tell(machine, "created")
        return machine.name

    async def differences(self, id: str, machine: Machine) -> list[str]:
        return []

    def _write_down(self, machine: Machine) -> None:
        place = self._place(machine.name)
        place.mkdir(mode=0o700, exist_ok=True)
        found = read_record(place / MACHINE, Machine)
        if found is None:
            write_record(place / MACHINE, machine)
        elif not has(found.labels, machine.labels):
            raise InvalidParams(f"name: there is a machine {machine.name} of somebody else")

    async def start(self, id: str) -> None:
        machine = await self._machine(id)
        if await self._find(id) is not None:
            return
        try:
            await self._end_strays(id)  # its boxes go on: the next server finds them
            async with asyncio.timeout(START_SECONDS):
                await self._start(machine)
        except TimeoutError:
            await self.stop(id, keep_data=True)
            raise WorkspaceUnavailable(
                f"the server was not ready after {START_SECONDS:g} s: {await self.logs(id)}", phase="ready"
            ) from None
        except BaseException:
            await self.stop(id, keep_data=True)
            raise

    async def _start(self, machine: Machine) -> None:
        if machine.profile != "server":  # whoever uses it learns from itself when it is ready
            try:
                child = self._hold(machine, self._spawn(machine, None))
            except OSError as exc:
                raise WorkspaceUnavailable(f"it did not start: {exc.strerror}", phase="start") from None
            await in_thread(write_record, self._place(machine.name) / PROCESS, Record(child.identity, ""))
            return
        reading, writing = os.pipe()
        try:
            child = self._hold(machine, self._spawn(machine, writing))
        except OSError as exc:
            os.close(reading)
            raise WorkspaceUnavailable(f"the server did not start: {exc.strerror}", phase="start") from None
        finally:
            os.close(writing)
        line = await first_line(reading, LONGEST_LINE)
        try:
            url = msgspec.json.decode(line, type=_Ready).url
        except msgspec.DecodeError:
            code = await asyncio.shield(child.ended) if not line else None
            words = one_line(await self.logs(machine.name))
            raise WorkspaceUnavailable(
                f"the server ended at its start with {code}: {words or 'it said nothing'}", phase="start"
            ) from None
        await in_thread(write_record, self._place(machine.name) / PROCESS, Record(child.identity, url))

    def _spawn(self, machine: Machine, stdout: int | None) -> Child:
        place, beside = self._place(machine.name), Path(agent_sdk.__file__).parent.parent
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        log = os.open(place / LOG, flags, 0o600)
        command, own = list(machine.command or ()), {**machine.env, **machine.secret_env}
        if machine.profile == "server":
            command = [sys.executable, "-m", "agent_server", "serve", "--json", "--host", "127.0.0.1"]
            command += ["--port", "0", "--data", str(place / DATA)]
            own = {**_variables(machine), **OPTIONS}
        try:
            return Child.start(
                command,
                # Beside the package, so that `-m` finds it however it was installed.
                cwd=Path(machine.working_dir or beside) if machine.profile != "server" else beside,
                environment={**self._environment, **own, MARKER: machine.name},
                stdout=log if stdout is None else stdout,
                stderr=log,
            )
        finally:
            os.close(log)

    def _hold(self, machine: Machine, child: Child) -> Child:
        self._children[machine.name] = child
        child.ended.add_done_callback(lambda _: self._tell(machine, "ended"))
        self._tell(machine, "running")
        return child

    def _tell(self, machine: Machine, state: State) -> None:
        for queue in self._queues:
            queue.put_nowait(Found(machine.name, machine.name, machine.labels, state))

    # --- its life ---

    async def wait(self, id: str) -> Ending:
        child = self._children.get(id) or await self._find(id)
        code = await asyncio.shield(child.ended) if child is not None else None
        words = one_line(await self.logs(id))
        if code is None:
            return Ending("engine", None, "the server ended", words)
        if code < 0:
            return Ending("killed", code, f"the server was ended by signal {-code}", words)
        return Ending("exit", code, f"the server ended with {code}", words)

    async def endpoint(self, id: str, port: int) -> str:
        await self._machine(id)
        record = await in_thread(read_record, self._place(id) / PROCESS, Record)
        if record is None or not record.url or await self._find(id) is None:
            raise WorkspaceUnavailable(f"no server of {id} runs", phase="ready")
        return record.url

    async def pause(self, id: str) -> None:
        await self.stop(id, grace=PAUSE_SECONDS, keep_data=True)

    async def resume(self, id: str) -> None:
        await self.start(id)

    async def inspect(self, id: str) -> Facts:
        machine = await self._machine(id)
        return Facts(
            id=id,
            name=id,
            state=await self._state(id),
            labels=machine.labels,
            image=machine.image,
            env={**machine.env, **machine.secret_env},
            network=None,
        )

    async def logs(self, id: str, lines: int = 20) -> str:
        return "\n".join((await in_thread(last_lines, self._place(id) / LOG))[-lines:])

    async def list(self, labels: Mapping[str, str | None]) -> list[Found]:
        found = [
            Found(machine.name, machine.name, machine.labels, await self._state(machine.name))
            for machine in await in_thread(self._machines)
        ]
        return [each for each in found if has(each.labels, labels)]

    async def events(self, labels: Mapping[str, str | None]) -> AsyncIterator[Found]:
        queue: asyncio.Queue[Found] = asyncio.Queue()
        self._queues.add(queue)
        try:
            for found in await self.list(labels):
                yield found
            while True:
                found = await queue.get()
                if has(found.labels, labels):
                    yield found
        finally:
            self._queues.discard(queue)

    async def usage(self, id: str) -> Usage:
        await self._machine(id)
        return Usage()

    async def _state(self, id: str) -> State:
        if await self._find(id) is not None:
            return "running"
        return "ended" if (self._place(id) / LOG).exists() else "created"

    # --- its end ---

    async def stop(self, id: str, *, grace: float = 0, keep_data: bool = False) -> None:
        await to_its_end(self._stop(id, grace, keep_data))

    async def _stop(self, id: str, grace: float, keep_data: bool) -> None:
        child, place = await self._find(id), self._place(id)
        # One that is removed has to end its boxes, too, which only it knows of all kinds.
        grace = grace or (0 if keep_data else PAUSE_SECONDS)
        if child is not None and grace:
            child.signal(signal.SIGTERM)
            await asyncio.wait([child.ended], timeout=grace)
        await self._end_strays(id)
        if child is not None:
            child.signal(signal.SIGKILL)
            await child.ended
        self._children.pop(id, None)
        if self._end_rest is not None:
            await self._end_rest(place / DATA)
        await in_thread(_remove, place, keep_data)

    async def _end_strays(self, id: str) -> None:
        """End a server whose number nobody came to write down, also one that knows its name without the prefix."""
        for name in {id, id.removeprefix(self._prefix)}:
            await end_tree(Tree(f"{MARKER}={name}\0".encode()), grace=0)

    # --- what is kept ---

    def _place(self, id: str) -> Path:
        name = id.removeprefix(self._prefix)
        if not name or "/" in name or name.startswith("."):
            raise NotFound(f"no machine can have the name {id[:64]!r}")
        return self._folder / name

    async def _machine(self, id: str) -> Machine:
        machine = await in_thread(read_record, self._place(id) / MACHINE, Machine)
        if machine is None:
            raise NotFound(f"there is no machine {id[:64]!r}")
        return machine

    def _machines(self) -> Sequence[Machine]:
        found = (read_record(place / MACHINE, Machine) for place in sorted(self._folder.iterdir()))
        return [machine for machine in found if machine is not None]

    async def _find(self, id: str) -> Child | None:
        """Return the process of a machine, if it lives."""
        child = self._children.get(id)
        if child is None:
            record = await in_thread(read_record, self._place(id) / PROCESS, Record)
            machine = await in_thread(read_record, self._place(id) / MACHINE, Machine)
            child = self._children.get(id)
            if child is None and record is not None and machine is not None:
                found = Child.find(record.identity)
                child = None if found is None else self._hold(machine, found)
        return None if child is None or child.ended.done() else child


def _variables(machine: Machine) -> dict[str, str]:
    """The server's options, and all else for its commands: with PYTHONPATH it would be another program.

    Commands run as this user, so whose they are to be is not passed on.
    """
    options = {
        name: text
        for name, text in {**machine.env, **machine.secret_env}.items()
        if name.startswith(OPTION) and name != f"{OPTION}BOX_USER"
    }
    return packed({name: text for name, text in machine.env.items() if not name.startswith(OPTION)}) | options


def _remove(place: Path, keep_data: bool) -> None:
    (place / PROCESS).unlink(missing_ok=True)
    if not keep_data:
        shutil.rmtree(place / DATA, ignore_errors=True)
        for name in (LOG, MACHINE):
            (place / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else keeps something there, too
            place.rmdir()
