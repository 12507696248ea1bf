"""What the sandboxes of a server share: where they run, what their boxes are made from, and where their files are.

The engine is connected to when it is needed first, so a server without one starts, and one that comes later is used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import Struct

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import WorkspaceUnavailable
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.disk import in_thread
from workspaces.backend import labels, sandbox_files
from workspaces.backend.contract import Backend, Image, State, parse_size
from workspaces.backend.disks import Disks, Snapshots
from workspaces.backend.records import instance_of
from workspaces.box.folder import BoxFolder
from workspaces.box.machine import Accounts, Places, accounts

if TYPE_CHECKING:
    from workspaces.box.runtime import BoxRuntime

IDENTITY = "instance"
NOBODY = "pool-"
"""Begins the name of an owner who is nobody yet."""
OUTPUT_BYTES = 1 << 30
"""What commands of a sandbox say, all together; beyond that only the end of it is kept."""
MOST_IMAGES = 256
"""Whose users are remembered."""

Tell = Callable[[str, dict[str, str]], None]


class SandboxOptions(Struct, frozen=True, kw_only=True):
    """What a server wants for all its sandboxes."""

    engine: str | None = None
    """unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets."""
    runtime: str = "runc"
    """Of the engine, for sandboxes that name none."""
    linger: float = 3600.0
    """Seconds that a box goes on without its server."""
    environment: Mapping[str, str] = {}
    """Variables of all commands."""
    runtimes: Path | None = None
    """The folder of box runtimes; None: one in the data folder."""
    disk: int | None = 2 << 30
    """Bytes of a workspace that nobody said a size for, where they can be limited; None: no workspace has a limit."""
    mounts: tuple[str, ...] = ()
    """Folders of this machine of which parts may be mounted."""
    pool: Mapping[str, int] = {}
    """How many boxes of which image wait for an owner."""


T = TypeVar("T")


class Once(Generic[T]):
    """Work that is done once, however many wait for it, and again when it has failed. Cancelling does not stop it."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """Return what came of it."""
        if self._task is None or self._has_failed:
            self._task = asyncio.create_task(self._work())
        return await asyncio.shield(self._task)

    @property
    def is_running(self) -> bool:
        """Whether it was begun and has not come to anything yet."""
        return self._task is not None and not self._task.done()

    @property
    def _has_failed(self) -> bool:
        task = self._task
        return task is not None and task.done() and (task.cancelled() or task.exception() is not None)

    async def close(self) -> None:
        """End it."""
        await cancel_and_wait(self._task)


class SandboxHost:
    """What the sandboxes of a server share. `close` lets go of the engine."""

    def __init__(
        self,
        folder: Path,
        options: SandboxOptions,
        tell: Tell,
        opened: Callable[[Backend], AbstractAsyncContextManager[object]],
    ) -> None:
        """Take what they need.

        Args:
            folder: the data folder of the server.
            options: what it wants.
            tell: called with the name of what has happened to all of them, and facts.
            opened: entered when there is a backend, and left before it is let go of.
        """
        self.options = options
        self.instance = ""
        """Which server owns them: a label of all its machines. Empty while there was none."""
        self.disks = Disks(folder, quota=options.disk is not None)
        """The workspaces."""
        self.snapshots = Snapshots(folder / "snapshots", self.disks)
        self.changes: dict[str, Callable[[State], Awaitable[None]]] = {}
        """Who is told when the state of a machine has changed, by its id."""
        self.backend = Once(self._connect)
        """Connects to the engine. Raises EngineUnavailable: there is none, or it does not answer."""
        self.runtime = Once(self._make_runtime)
        """Makes the box runtime where it is missing. Raises WorkspaceUnavailable: it cannot be made."""
        self._folder = folder
        self._tell = tell
        self._opened = opened
        self._spools = Disks(folder / "spools", quota=options.disk is not None)
        self._temporary = Disks(folder / "temporary", quota=options.disk is not None)
        self._accounts: dict[str, Once[Accounts]] = {}
        """By the id of the image, which never changes."""
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<SandboxHost {self.instance or self._folder}>"

    async def close(self) -> None:
        """Let go of the engine and end what was begun."""
        works: list[Once[Any]] = [self.backend, self.runtime, *self._accounts.values()]
        for work in works:
            await work.close()
        await self._stack.aclose()

    def folder(self, owner: str) -> BoxFolder:
        """Return the folder of the box of an owner."""
        return BoxFolder(self._folder / "boxes" / owner)

    def folders(self, pattern: str = "*") -> list[BoxFolder]:
        """Return the folders of the boxes of all owners whose names are like this. Blocks."""
        return [BoxFolder(place) for place in (self._folder / "boxes").glob(pattern)]

    def labels(self, owner: str) -> dict[str, str]:
        """Return the labels of a machine for this owner."""
        return {
            labels.INSTANCE: self.instance,
            labels.ROLE: labels.BOX,
            labels.CONVERSATION: owner,
            labels.GENERATION: str(time.time_ns()),
            # Nobody else counts the time while it runs. Alone it ends itself, so what has ended by then is left over.
            labels.EXPIRES: str(int(time.time() + self.options.linger)),
        }

    async def accounts(self, image: Image) -> Accounts:
        """Return the users of an image. Raises as `accounts`."""
        backend = await self.backend()
        found = self._accounts.get(image.id)
        if found is None:
            if len(self._accounts) >= MOST_IMAGES:
                self._accounts = {id: once for id, once in self._accounts.items() if once.is_running}
            found = self._accounts[image.id] = Once(lambda: accounts(backend, image))
        return await found()

    # --- files ---

    async def check(self, spec: Sandbox) -> None:
        """Check whether there could be files of these sizes now.

        Raises:
            IsolationUnavailable: they cannot have the limit that was asked for.
            InvalidParams: there is no such snapshot, or a size makes no sense.
        """
        self._temporary.check(_bytes("tmp", spec.tmp), "sandbox.tmp")
        if spec.snapshot is not None:
            await in_thread(self.snapshots.check, spec.snapshot, _bytes("disk", spec.disk))
        else:
            self.disks.check(_bytes("disk", spec.disk))

    @asynccontextmanager
    async def at_hand(self, owner: str, spec: Sandbox, temporary: int) -> AsyncIterator[Places]:
        """Have the places of an owner for as long as a machine starts; they are made where they are missing.

        Args:
            owner: whose they are.
            spec: how large they may be.
            temporary: how many empty folders besides, which have one limit together.
        """
        backend, runtime = await self.backend(), await self.runtime()
        wanted = _bytes("disk", spec.disk)
        if spec.snapshot is not None:
            await self.snapshots.lay_out(spec.snapshot, owner, wanted)
        size, is_task = wanted or self.options.disk or 0, spec.profile == "task"
        await asyncio.gather(
            self.disks.make(owner, size),
            self._spools.make(owner, OUTPUT_BYTES),
            self._temporary.make(owner, _bytes("tmp", spec.tmp) or size),
        )
        async with (
            self.disks.at_hand(owner) as workspace,
            self._spools.at_hand(owner) as output,
            self._temporary.at_hand(owner) as around,
        ):
            folders = await in_thread(sandbox_files.make_within, around, temporary)
            for place in (workspace, output) if is_task else ():  # whoever commands are there
                await in_thread(sandbox_files.open_to_all, place)
            own = self.folder(owner)
            yield Places(
                workspace=workspace,
                output=output,
                temporary=tuple(folders),
                folder=own.run,
                etc=own.etc,
                runtime=runtime.path,
                root_size=size if is_task and backend.root_limit and size else None,
            )

    async def hand_over(self, owner: str, to: str) -> BoxFolder:
        """Give all files of an owner who is nobody yet to somebody who has none."""
        await self.disks.hand_over(owner, to)
        for disks in (self._spools, self._temporary):
            await disks.remove(to)
            await disks.hand_over(owner, to)
        return await in_thread(self.folder(owner).rename, self.folder(to))

    async def tidy(self, owner: str) -> None:
        """Remove what a machine of this owner leaves behind, but for its workspace."""
        await asyncio.gather(self._spools.remove(owner), self._temporary.remove(owner))

    # --- how ---

    async def _connect(self) -> Backend:
        from workspaces.backend.docker.backend import docker_backend  # noqa: PLC0415  aiodocker costs 0.3 s

        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(docker_backend(self.options.engine))
            self.instance = await in_thread(instance_of, self._folder / IDENTITY)
            await self._prepare_disks(backend.unseen)
            await stack.enter_async_context(_task(self._pass_on_changes(backend)))
            await stack.enter_async_context(self._opened(backend))
            self._stack = stack.pop_all()
        return backend

    async def _pass_on_changes(self, backend: Backend) -> None:
        async for found in backend.events({labels.INSTANCE: self.instance}):
            if (told := self.changes.get(found.id)) is not None:
                await told(found.state)

    async def _prepare_disks(self, unseen: str) -> None:
        try:
            for disks in (self.disks, self._spools, self._temporary):
                await disks.prepare(unseen=unseen)
            await self.disks.keep(lambda owner: not owner.startswith(NOBODY))
            for disks in (self._spools, self._temporary):
                await disks.keep(lambda owner: self.folder(owner).read() is not None)
        except OSError as exc:
            raise WorkspaceUnavailable(
                f"no sandboxes can be kept in {self._folder}: {exc.strerror}", phase="disk"
            ) from None
        self._tell("engine_found", {"disk_quota": self.disks.mechanism, "reason": self.disks.why})

    async def _make_runtime(self) -> BoxRuntime:
        from workspaces.box.runtime import box_runtime  # noqa: PLC0415

        return await box_runtime(self.options.runtimes or self._folder / "runtime")


@asynccontextmanager
async def _task(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        await cancel_and_wait(task)


def _bytes(field: str, size: str | None) -> int | None:
    return None if size is None else parse_size(f"sandbox.{field}", size)
