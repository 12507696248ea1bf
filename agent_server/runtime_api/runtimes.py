"""All runtimes of the Runtime API: found by their sessions, kept on the disk, within what their tenants may have.

Each has a folder below `runtimes`, named by its id, whose `session.json` is written before anything is
started and removed after everything has ended. So whatever is killed at whichever moment, the next server
knows what there may be.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Self

import msgspec

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    ImageUnavailable,
    InvalidParams,
    NotFound,
    Overloaded,
    PolicyDenied,
)
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.environment import packed
from agent_server.config.options import RuntimeConfig
from agent_server.logs import Logs
from agent_server.runtime_api.record import (
    FOR_OTHERS,
    RECORD,
    Record,
    Tenant,
    Wanted,
    machine_name,
    machine_of,
)
from agent_server.runtime_api.runtime import Runtime
from workspaces.backend.contract import Backend
from workspaces.backend.sweep import Sweep
from workspaces.server import Server

FACTORS = (1, 2, 4, 8)
SWEEP_SECONDS = 15.0
RETRY_AFTER_MS = 5000
ENVIRONMENT_BYTES = 128 << 10
"""What Linux takes for one variable with its name and last zero (MAX_ARG_STRLEN in binfmts.h)."""
REMOVED = ".removed-"


class Runtimes:
    """All runtimes. Entering finds what a former server left, leaving lets it go on."""

    def __init__(
        self,
        config: RuntimeConfig,
        folder: Path,
        backend: Backend,
        logs: Logs,
        *,
        labels: Mapping[str, str],
        end: bool,
    ) -> None:
        """Describe them.

        Args:
            config: the table `runtime_api`.
            folder: where they are kept; made when it is missing.
            backend: where they run.
            logs: what happens to them is told there.
            labels: of the machines of all of them, and of nothing else.
            end: whether nothing of them runs on when this is left.
        """
        self._config = config
        self._folder = folder
        self._backend = backend
        self._labels = dict(labels)
        self._leftovers = Sweep(
            backend,
            labels,
            self._owned,
            on_removed=lambda name: logs.log.warning("leftover_removed", name=name),
            on_problem=self._not_swept,
        )
        self._logs = logs
        self._end = end
        self._all: dict[str, Runtime] = {}
        self._sessions: dict[tuple[str, str], Runtime] = {}
        """By tenant and session; without those that are being ended."""
        self._unreadable: set[str] = set()
        self._sweeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Runtimes, {len(self._all)}>"

    async def __aenter__(self) -> Self:
        for record in await in_thread(self._records):
            try:
                runtime = self._add(record)
            except InvalidParams as exc:  # the configuration of today does not allow it
                self._not_read(self._folder / record.runtime_id, exc)
            else:
                runtime.recover()
        self._sweeper = asyncio.create_task(self._sweep_for_ever())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await cancel_and_wait(self._sweeper)
        await asyncio.gather(*(runtime.close(end=self._end) for runtime in self._all.values()))

    # --- which there are ---

    def find(self, runtime_id: str) -> Runtime | None:
        """Return a runtime, whosever it is."""
        runtime = self._all.get(runtime_id)
        return None if runtime is None or runtime.record.wanted == "gone" else runtime

    def of(self, tenant: Tenant) -> Iterator[Runtime]:
        """Yield the runtimes of a tenant, the oldest first."""
        return (runtime for (name, _), runtime in self._sessions.items() if name == tenant.name)

    def session(self, tenant: Tenant, session_id: str) -> Runtime:
        """Return the runtime of a session.

        Raises:
            NotFound: the tenant has no such session.
        """
        runtime = self._sessions.get((tenant.name, session_id))
        if runtime is None:
            raise NotFound(f"no session {session_id[:128]!r}")
        return runtime

    def named(self, tenant: Tenant, runtime_id: str) -> Runtime:
        """Return a runtime of this tenant.

        Raises:
            NotFound: the tenant has none of this id.
        """
        runtime = self.find(runtime_id)
        if runtime is None or runtime.record.tenant != tenant.name:
            raise NotFound(f"no runtime {runtime_id[:128]!r}")
        return runtime

    # --- verbs ---

    async def start(self, tenant: Tenant, wanted: Wanted) -> Runtime:
        """Return the runtime of a session, which runs or is about to; a paused or failed one is started again.

        Raises:
            InvalidParams: the factor is none, there is no command in its text, or the environment is too large.
            ImageUnavailable: the image may not be started.
            PolicyDenied: the tenant may never have that much, or the class is none that may be asked for, or
                none that this backend can give.
            Overloaded: it may, when it has ended something else; details: retry_after_ms.
        """
        runtime = self._sessions.get((tenant.name, wanted.session_id))
        if runtime is not None:
            await self.resume(tenant, runtime)
            return runtime
        if wanted.resource_factor not in FACTORS:
            raise InvalidParams(f"resource_factor must be 1, 2, 4 or 8 (got {wanted.resource_factor})")
        self._check_image(wanted.image)
        _check_command(wanted.command)
        _check_environment(wanted.environment)
        if self._runtime_of(wanted.runtime_class) is not None and "isolate" not in self._backend.can:
            raise PolicyDenied(
                f"runtime_class: runtimes are processes here, none can be isolated as {wanted.runtime_class}; "
                "leave runtime_class out, or ask a Runtime API with containers",
                status=403,
            )
        record = self._record(tenant, wanted)
        self._admit_another(tenant)
        self._admit(tenant, record)
        runtime = self._add(record)
        try:
            await runtime.start()
        except AgentServerError:
            await self.stop(runtime)
            raise
        return runtime

    async def resume(self, tenant: Tenant, runtime: Runtime) -> None:
        """Make it run, unless it does.

        Raises:
            PolicyDenied, Overloaded: it is more than the tenant may have, ever or at present.
        """
        await runtime.start(partial(self._admit, tenant, runtime.record))

    async def stop(self, runtime: Runtime) -> None:
        """End it and remove all of it; its session is free at once."""
        record = runtime.record
        if self._sessions.get((record.tenant, record.session_id)) is runtime:
            del self._sessions[record.tenant, record.session_id]
        await runtime.stop()
        await in_thread(_remove, self._folder / record.runtime_id)
        if self._all.pop(record.runtime_id, None) is not None:
            self._logs.log.info("runtime_removed", runtime=record.runtime_id)

    # --- what is allowed ---

    def _check_image(self, image: str) -> None:
        patterns = self._config.images
        if not any(fnmatchcase(image, pattern) for pattern in patterns):
            raise ImageUnavailable(
                f"the image {image} may not be started here; allowed are {', '.join(patterns) or 'none'}",
                image=image,
                phase="image",
                status=403,
            )

    def _runtime_of(self, name: str | None) -> str | None:
        classes = self._config.runtime_classes
        if name is not None and name not in classes:
            raise PolicyDenied(
                f"runtime_class: there is no {name[:128]!r} here; allowed are {', '.join(classes) or 'none'}",
                status=403,
            )
        return classes[name] or None if name is not None else None

    def _admit_another(self, tenant: Tenant) -> None:
        count = sum(runtime.record.tenant == tenant.name for runtime in self._all.values())
        if tenant.sandboxes is not None and count >= tenant.sandboxes:
            raise Overloaded(
                f"limit {tenant.sandboxes} runtimes of {tenant.name}; stop one",
                reason="sandboxes",
                limit=tenant.sandboxes,
                retry_after_ms=RETRY_AFTER_MS,
            )

    def _admit(self, tenant: Tenant, record: Record) -> None:
        others = [
            each
            for each in self._all.values()
            if each.record.tenant == tenant.name and each.record.runtime_id != record.runtime_id
        ]
        cpus = sum(each.record.cpus for each in others if each.runs)
        memory = sum(each.record.memory for each in others if self._holds_memory(each))
        for what, limit, used, more in (
            ("cpus", tenant.cpus, cpus, record.cpus),
            ("bytes of memory", tenant.memory, memory, record.memory),
        ):
            if limit is not None and more > limit:
                raise PolicyDenied(f"it needs {more:g} {what}; {tenant.name} may have {limit:g}")
            if limit is not None and used + more > limit:
                raise Overloaded(
                    f"limit {limit:g} {what} of {tenant.name}, {used:g} are in use; stop a runtime",
                    reason=what,
                    limit=limit,
                    retry_after_ms=RETRY_AFTER_MS,
                )

    def _holds_memory(self, runtime: Runtime) -> bool:
        return runtime.runs or ("freeze" in self._backend.can and runtime.pod_status == "not found")

    # --- what is kept ---

    def _record(self, tenant: Tenant, wanted: Wanted) -> Record:
        factor = wanted.resource_factor
        given = msgspec.structs.asdict(wanted)
        disk = self._config.unit_disk * factor if "disk_limit" in self._backend.can else 0
        given["environment"] = {
            name: text for name, text in wanted.environment.items() if name not in FOR_OTHERS
        }
        return Record(
            **given,
            runtime_id=new_id(),
            tenant=tenant.name,
            api_key=secrets.token_urlsafe(32),
            cpus=self._config.unit_cpus * factor,
            memory=self._config.unit_memory * factor,
            disk=disk or None,
            created=time.time(),
        )

    def _add(self, record: Record) -> Runtime:
        folder = self._folder / record.runtime_id
        isolation = record.runtime_class
        # A class that the operator has taken away meanwhile is nothing that may be guessed.
        with suppress(PolicyDenied):
            isolation = self._runtime_of(record.runtime_class)
        network = self._config.network or None
        machine = machine_of(record, labels=self._labels, network=network, runtime=isolation)
        server = Server(self._backend, machine, patience="start_seconds")
        runtime = Runtime(record, server, folder, self._logs, start_seconds=self._config.start_seconds)
        self._all[record.runtime_id] = runtime
        if record.wanted != "gone":
            self._sessions[record.tenant, record.session_id] = runtime
        return runtime

    def _records(self) -> list[Record]:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        found = []
        for folder in sorted(path for path in self._folder.iterdir() if path.is_dir()):
            if folder.name.startswith(REMOVED):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                found.append(msgspec.json.decode((folder / RECORD).read_bytes(), type=Record))
            except FileNotFoundError:
                _remove(folder)  # nothing was started before that file was whole
            except (OSError, msgspec.DecodeError) as exc:
                self._not_read(folder, exc)
        return found

    def _not_read(self, folder: Path, problem: Exception) -> None:
        self._unreadable.add(folder.name)  # what it has is not touched
        self._logs.log.error("runtime_unreadable", folder=str(folder), problem=str(problem))

    # --- what is swept up ---

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                await self._sweep()
            except (AgentServerError, OSError) as exc:
                self._not_swept(exc)
            await asyncio.sleep(SWEEP_SECONDS)

    async def _sweep(self) -> None:
        for runtime in list(self._all.values()):
            if runtime.record.wanted == "gone":
                try:
                    await self.stop(runtime)
                except (AgentServerError, OSError) as exc:
                    self._not_swept(exc)
        await self._leftovers.once()

    def _owned(self) -> set[str]:
        return {machine_name(runtime_id) for runtime_id in [*self._all, *self._unreadable]}

    def _not_swept(self, problem: Exception) -> None:
        self._logs.log.warning("runtimes_not_swept", problem=str(problem))


def _check_command(command: str | list[str] | None) -> None:
    """Check that a text can be split into words.

    Raises:
        InvalidParams: it cannot, or there is no word.
    """
    try:
        if command is None or (shlex.split(command) if isinstance(command, str) else command):
            return
        problem = "it has no word"
    except ValueError as exc:
        problem = str(exc)
    raise InvalidParams(f"command: {problem}; write a program and its arguments, as for a shell")


def _check_environment(variables: Mapping[str, str]) -> None:
    """Check that the kernel takes the variables, which reach a server and its boxes as one of theirs.

    Raises:
        InvalidParams: they are too long together.
    """
    size = sum(len(name.encode()) + len(text.encode()) + 1 for name, text in packed(variables).items())
    if size >= ENVIRONMENT_BYTES:
        raise InvalidParams(
            f"environment: at most {ENVIRONMENT_BYTES - 1} bytes as JSON, got {size}; "
            "put large values into files of the workspace"
        )


def _remove(folder: Path) -> None:
    """Remove a folder; one that is removed in part is never taken for a runtime."""
    doomed = folder.with_name(f"{REMOVED}{folder.name}")
    with suppress(FileNotFoundError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
