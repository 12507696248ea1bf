"""The sandboxes of a server: what they share, and where the files of each are.

The engine is connected to when it is needed first, so a server without one starts, and one that comes later is used.
Where there were sandboxes before, or some are to wait for owners, that is at once: something may be left to sweep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from msgspec import Struct

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, WorkspaceUnavailable
from agent_sdk.protocol.methods.workspace import SnapshotTaken
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.disk import in_thread
from workspaces.backend import labels
from workspaces.backend.contract import parse_size
from workspaces.backend.docker.accounts import Accounts, accounts
from workspaces.backend.docker.profiles import UID, WORKSPACE
from workspaces.backend.records import instance_of
from workspaces.backend.sweep import Sweep
from workspaces.box import sandbox_files
from workspaces.box.container import BoxContainer
from workspaces.box.contract import Box
from workspaces.box.disks import Disks
from workspaces.box.folder import BoxFolder, Record
from workspaces.box.site import Places, Site
from workspaces.box.snapshots import Snapshots

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine, Image
    from workspaces.backend.docker.reach import HostPaths
    from workspaces.box.pool import Pool
    from workspaces.box.runtime import BoxRuntime

IDENTITY = "instance"
NOBODY = "pool-"
"""Begins the name of an owner who is nobody yet."""
OUTPUT_BYTES = 1 << 30
"""What commands of a sandbox say, all together; beyond that only the end of it is kept."""
AGAIN_SECONDS = 15.0
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


class _Ground(NamedTuple):
    """What there is once the engine has answered."""

    engine: Engine
    paths: HostPaths
    pool: Pool

    def is_the_engines(self, folder: Path) -> bool:
        """Whether a folder is below that of the engine itself."""
        return Path(self.paths.of(folder)).is_relative_to(self.engine.info.root_dir or "/")


class Sandboxes(Site):
    """The sandboxes of a server. Leaving lets go of the engine and of all sandboxes that have an owner."""

    def __init__(
        self, folder: Path, options: SandboxOptions, *, tell: Tell = lambda event, facts: None
    ) -> None:
        """Take what they need.

        Args:
            folder: the data folder of the server.
            options: what it wants.
            tell: called with the name of what has happened to all of them, and facts.
        """
        self._folder = folder
        self._options = options
        self._tell = tell
        self._disks = Disks(folder, quota=options.disk is not None)
        self._spools = Disks(folder / "spools", quota=options.disk is not None)
        self._temporary = Disks(folder / "temporary", quota=options.disk is not None)
        self._snapshots = Snapshots(folder / "snapshots", self._disks)
        self._stack = AsyncExitStack()
        self._connecting: asyncio.Task[_Ground] | None = None
        self._runtime: asyncio.Task[BoxRuntime] | None = None
        self._accounts: dict[str, asyncio.Task[Accounts]] = {}
        """By the id of the image, which never changes."""
        self._attending: asyncio.Task[None] | None = None
        self._instance = ""

    def __repr__(self) -> str:
        return f"<Sandboxes of {self._instance or self._folder}>"

    async def __aenter__(self) -> Self:
        await in_thread(self._forget_nobodys)
        if self._options.pool or (self._folder / IDENTITY).exists():
            self._attending = asyncio.create_task(self._attend())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (self._attending, self._connecting, self._runtime, *self._accounts.values()):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self._stack.aclose()

    @property
    def instance(self) -> str:
        """Which server owns them: a label of all its containers. Empty while there was none."""
        return self._instance

    @property
    def linger(self) -> float:
        return self._options.linger

    @property
    def environment(self) -> Mapping[str, str]:
        return self._options.environment

    @property
    def allowed_mounts(self) -> tuple[str, ...]:
        return self._options.mounts

    @property
    def preferred_runtime(self) -> str:
        return self._options.runtime

    # --- one of them ---

    async def admit(self, spec: Sandbox) -> Engine:
        """Check whether there could be such a sandbox now, and return the engine.

        Raises:
            EngineUnavailable: there is no engine.
            IsolationUnavailable: its workspace cannot have the limit that was asked for.
            InvalidParams: there is no such snapshot, or the size makes no sense.
        """
        engine = await self.engine()
        self._temporary.check(_bytes("tmp", spec.tmp), "sandbox.tmp")
        if spec.snapshot is not None:
            await in_thread(self._snapshots.check, spec.snapshot, self._size(spec))
        else:
            self._disks.check(self._size(spec))
        return engine

    def box(self, owner: str, spec: Sandbox, instance: str) -> Box:
        """Return the box for this owner, not started."""
        return BoxContainer(
            self, self._box_folder(owner), owner, spec, instance=instance, waiting=self._waiting
        )

    def recorded(self, owner: str) -> Record | None:
        """Return what a former server noted of the container it has left, living or dead."""
        return self._box_folder(owner).read()

    async def find(self, owner: str) -> Box | None:
        """Return that box; one that has ended is `ended`, and wants to be cleaned up.

        Raises:
            EngineUnavailable: nobody knows whether it lives.
        """
        return await BoxContainer.find(self, self._box_folder(owner), owner)

    async def forget(self, owner: str) -> None:
        """Remove the workspace of an owner for good; nothing runs in it any more."""
        await self._disks.remove(owner)

    def has_files(self, owner: str) -> bool:
        """Whether something may be in the workspace of an owner; what is on a disk is not looked at. Blocks."""
        if self._disks.image(owner).exists():
            return True
        folder = self._disks.folder(owner)
        try:
            return folder.exists() and sandbox_files.size(folder) > 0
        except OSError:
            return True

    async def snapshot(self, owner: str) -> SnapshotTaken:
        """Copy the files of an owner; nothing may write them meanwhile."""
        return await self._snapshots.take(owner)

    # --- what they share ---

    async def engine(self) -> Engine:
        """Return the engine, connecting to it when that was not done yet. Cancelling does not stop that.

        Raises:
            EngineUnavailable: there is none, or it does not answer; asking again tries again.
        """
        return (await self._ground()).engine

    async def runtime(self) -> BoxRuntime:
        """Return the box runtime, made where it is missing. Cancelling does not stop that.

        Raises:
            WorkspaceUnavailable: it cannot be made.
        """
        if self._runtime is None or (self._runtime.done() and _failed(self._runtime)):
            self._runtime = asyncio.create_task(self._make_runtime())
        return await asyncio.shield(self._runtime)

    async def accounts(self, image: Image) -> Accounts:
        """Return the users of an image. Cancelling does not stop that."""
        engine = await self.engine()
        task = self._accounts.get(image.id)
        if task is None or (task.done() and _failed(task)):
            if len(self._accounts) >= MOST_IMAGES:
                self._accounts = {id: task for id, task in self._accounts.items() if not task.done()}
            task = self._accounts[image.id] = asyncio.create_task(accounts(engine, image, UID, WORKSPACE))
        return await asyncio.shield(task)

    def labels(self, owner: str) -> dict[str, str]:
        return {
            labels.INSTANCE: self._instance,
            labels.ROLE: labels.BOX,
            labels.CONVERSATION: owner,
            labels.GENERATION: str(time.time_ns()),
            # Nobody else counts the time while it runs. Alone it ends itself, so what has ended by then is left over.
            labels.EXPIRES: str(int(time.time() + self._options.linger)),
        }

    @asynccontextmanager
    async def at_hand(self, owner: str, spec: Sandbox, temporary: int) -> AsyncIterator[Places]:
        ground, runtime = await self._ground(), await self.runtime()
        if spec.snapshot is not None:
            await self._snapshots.lay_out(spec.snapshot, owner, self._size(spec))
        size = self._size(spec) or self._options.disk or 0
        await asyncio.gather(
            self._disks.make(owner, size),
            self._spools.make(owner, OUTPUT_BYTES),
            self._temporary.make(owner, _bytes("tmp", spec.tmp) or size),
        )
        async with (
            self._disks.at_hand(owner) as workspace,
            self._spools.at_hand(owner) as output,
            self._temporary.at_hand(owner) as around,
        ):
            folders = await in_thread(sandbox_files.make_within, around, temporary)
            if spec.profile == "task":  # whoever commands are there
                for place in (workspace, output):
                    await in_thread(sandbox_files.open_to_all, place)
            yield Places(
                workspace=ground.paths.of(workspace),
                output=ground.paths.of(output),
                temporary=tuple(map(ground.paths.of, folders)),
                folder=ground.paths.of(self._box_folder(owner).run),
                etc=ground.paths.of(self._box_folder(owner).etc),
                runtime=ground.paths.of(runtime.path),
                size=size,
                propagation="rslave" if ground.is_the_engines(self._folder) else "rprivate",
            )

    def disk(self, owner: str) -> tuple[str, int | None, int | None]:
        occupied, most = self._disks.used(owner) or (None, None)
        return self._disks.mechanism, occupied, most

    async def tidy(self, owner: str) -> None:
        await asyncio.gather(self._spools.remove(owner), self._temporary.remove(owner))

    async def hand_over(self, owner: str, to: str) -> BoxFolder:
        await self._disks.hand_over(owner, to)
        for disks in (self._spools, self._temporary):
            await disks.remove(to)
            await disks.hand_over(owner, to)
        return await in_thread(self._box_folder(owner).rename, self._box_folder(to))

    # --- how ---

    def _waiting(self, owner: str, spec: Sandbox) -> BoxContainer | None:
        """A box that runs already, for an owner who has no workspace yet."""
        if self._connecting is None or not self._connecting.done() or _failed(self._connecting):
            return None
        return None if self._disks.has(owner) else self._connecting.result().pool.take(spec)

    def _nobodys(self, spec: Sandbox) -> BoxContainer:
        instance = new_id()
        owner = f"{NOBODY}{instance}"
        return BoxContainer(self, self._box_folder(owner), owner, spec, instance=instance)

    def _box_folder(self, owner: str) -> BoxFolder:
        return BoxFolder(self._folder / "boxes" / owner)

    def _size(self, spec: Sandbox) -> int | None:
        return _bytes("disk", spec.disk)

    async def _ground(self) -> _Ground:
        if self._connecting is None or (self._connecting.done() and _failed(self._connecting)):
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _attend(self) -> None:
        while True:
            try:
                await self._ground()
            except (AgentServerError, OSError) as exc:
                self._tell("engine_unavailable", {"problem": str(exc)})
            else:
                return
            await asyncio.sleep(AGAIN_SECONDS)

    async def _connect(self) -> _Ground:
        from workspaces.backend.docker.backend import DockerBackend  # noqa: PLC0415  aiodocker costs 0.3 s
        from workspaces.backend.docker.engine import Engine  # noqa: PLC0415
        from workspaces.backend.docker.reach import HostPaths  # noqa: PLC0415
        from workspaces.box.pool import Pool  # noqa: PLC0415

        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(Engine(self._options.engine))
            paths = await HostPaths.find(engine)
            self._instance = await in_thread(instance_of, self._folder / IDENTITY)
            await self._prepare_disks(paths)
            sweep = Sweep(
                DockerBackend(engine),
                {labels.INSTANCE: self._instance},
                self._owned,
                on_removed=lambda name: self._tell("swept", {"name": name}),
                on_problem=lambda exc: self._tell("sweep_failed", {"problem": str(exc)}),
            )
            await stack.enter_async_context(sweep)
            pool = Pool(
                self._options.pool,
                self._nobodys,
                on_ready=lambda image: self._tell("box_waits", {"image": image}),
                on_problem=lambda exc: self._tell("pool_not_filled", {"problem": str(exc)}),
            )
            await stack.enter_async_context(pool)
            self._stack = stack.pop_all()
        return _Ground(engine, paths, pool)

    async def _prepare_disks(self, paths: HostPaths) -> None:
        try:
            for disks in (self._disks, self._spools, self._temporary):
                await disks.prepare(unseen=paths.unseen)
            await self._disks.keep(lambda owner: not owner.startswith(NOBODY))
            for disks in (self._spools, self._temporary):
                await disks.keep(lambda owner: self.recorded(owner) is not None)
        except OSError as exc:
            raise WorkspaceUnavailable(
                f"no sandboxes can be kept in {self._folder}: {exc.strerror}", phase="disk"
            ) from None
        self._tell("engine_found", {"disk_quota": self._disks.mechanism, "reason": self._disks.why})

    async def _make_runtime(self) -> BoxRuntime:
        from workspaces.box.runtime import box_runtime  # noqa: PLC0415

        return await box_runtime(self._options.runtimes or self._folder / "runtime")

    def _owned(self) -> set[str]:
        """The containers on record. Blocks."""
        records = [BoxFolder(place).read() for place in (self._folder / "boxes").glob("*")]
        return {record.container for record in records if record is not None}

    def _forget_nobodys(self) -> None:
        """Forget the boxes that waited when a former server ended: the sweep finds what is left of them. Blocks."""
        for place in (self._folder / "boxes").glob(f"{NOBODY}*"):
            BoxFolder(place).remove()


def _bytes(field: str, size: str | None) -> int | None:
    return None if size is None else parse_size(f"sandbox.{field}", size)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None
