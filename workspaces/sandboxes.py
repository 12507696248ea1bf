"""The sandboxes of a server: what they share, and where the files of each are.

The engine is connected to when it is needed first, so a server without one starts, and one that comes later is used.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from agent_sdk.disk import in_thread
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable
from agent_sdk.protocol.methods import SnapshotTaken
from agent_sdk.protocol.specs import Sandbox
from workspaces import labels
from workspaces.box import Box
from workspaces.box_docker import BoxContainer, Places
from workspaces.box_folder import BoxFolder, Record
from workspaces.container_body import UID

if TYPE_CHECKING:
    from workspaces.box_runtime import BoxRuntime
    from workspaces.engine import Engine

IDENTITY = "instance"


class SandboxOptions(Struct, frozen=True, kw_only=True):
    """What a server wants for all its sandboxes."""

    engine: str | None = None
    """unix:///path or tcp://host:port; None: DOCKER_HOST, the Docker context, the usual sockets."""
    runtime: str = "runc"
    """Of the engine, for sandboxes that name none."""
    linger: float = 3600.0
    """Seconds that a box goes on without its server."""
    environment: dict[str, str] = {}
    """Variables of all commands."""
    runtimes: Path | None = None
    """The folder of box runtimes; None: one in the data folder."""


class Sandboxes:
    """See the module's docstring. Enter it; leaving lets go of the engine, and touches no sandbox."""

    def __init__(self, folder: Path, options: SandboxOptions) -> None:
        """Take the data folder of the server, and what it wants."""
        self._folder = folder
        self._options = options
        self._stack = AsyncExitStack()
        self._engine: asyncio.Task[Engine] | None = None
        self._runtime: asyncio.Task[BoxRuntime] | None = None
        self._instance = ""

    def __repr__(self) -> str:
        return f"<Sandboxes of {self._instance or self._folder}>"

    async def __aenter__(self) -> Self:
        self._instance = await in_thread(_identity, self._folder)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in (self._engine, self._runtime):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        await self._stack.aclose()

    @property
    def instance(self) -> str:
        """Which server owns them: a label of all its containers."""
        return self._instance

    @property
    def linger(self) -> float:
        """See Site."""
        return self._options.linger

    @property
    def environment(self) -> Mapping[str, str]:
        """See Site."""
        return self._options.environment

    @property
    def preferred_runtime(self) -> str:
        """See Site."""
        return self._options.runtime

    # --- one of them ---

    def box(self, owner: str, spec: Sandbox, instance: str) -> Box:
        """Return the box for this owner, not started."""
        return BoxContainer(self, self._box_folder(owner), owner, spec, instance=instance)

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
        await in_thread(shutil.rmtree, self._folder / "workspaces" / owner, True)

    async def snapshot(self, owner: str) -> SnapshotTaken:
        """Copy the files of an owner; nothing may write them meanwhile.

        Raises:
            IsolationUnavailable: there are no snapshots yet.
        """
        raise IsolationUnavailable("this server takes no snapshots", wanted="snapshot")

    # --- what they share ---

    async def engine(self) -> Engine:
        """Return the engine, connecting to it when that was not done yet. Cancelling does not stop that.

        Raises:
            EngineUnavailable: there is none, or it does not answer; asking again tries again.
        """
        if self._engine is None or (self._engine.done() and _failed(self._engine)):
            self._engine = asyncio.create_task(self._connect())
        return await asyncio.shield(self._engine)

    async def runtime(self) -> BoxRuntime:
        """Return the box runtime, made where it is missing. Cancelling does not stop that.

        Raises:
            WorkspaceUnavailable: it cannot be made.
        """
        if self._runtime is None or (self._runtime.done() and _failed(self._runtime)):
            self._runtime = asyncio.create_task(self._make_runtime())
        return await asyncio.shield(self._runtime)

    def labels(self, owner: str) -> dict[str, str]:
        """See Site."""
        return {
            labels.INSTANCE: self._instance,
            labels.ROLE: labels.BOX,
            labels.CONVERSATION: owner,
            labels.GENERATION: str(time.time_ns()),
            labels.EXPIRES: str(int(time.time() + self._options.linger)),
        }

    @asynccontextmanager
    async def at_hand(self, owner: str, spec: Sandbox) -> AsyncIterator[Places]:
        """See Site."""
        if spec.disk is not None:
            raise IsolationUnavailable("sandbox.disk: this server cannot limit a workspace", wanted="disk")
        workspace, output = self._folder / "workspaces" / owner, self._folder / "output" / owner
        for folder in (workspace, output):
            await in_thread(_make_folder, folder)
        yield Places(
            str(workspace), str(output), str(self._box_folder(owner).run), str((await self.runtime()).path)
        )

    async def tidy(self, owner: str) -> None:
        """See Site."""
        await in_thread(shutil.rmtree, self._folder / "output" / owner, True)

    def disk(self, owner: str) -> tuple[str, int | None, int | None]:
        """See Site."""
        return "none", None, None

    def _box_folder(self, owner: str) -> BoxFolder:
        return BoxFolder(self._folder / "boxes" / owner)

    async def _connect(self) -> Engine:
        from workspaces.engine import Engine  # noqa: PLC0415  aiodocker costs 0.3 s

        return await self._stack.enter_async_context(Engine(self._options.engine))

    async def _make_runtime(self) -> BoxRuntime:
        from workspaces.box_runtime import box_runtime  # noqa: PLC0415

        return await box_runtime(self._options.runtimes or self._folder / "runtime")


def _failed(task: asyncio.Task[object]) -> bool:
    return task.cancelled() or task.exception() is not None


def _identity(folder: Path) -> str:
    """The id of a data folder, made with the first look. Blocks."""
    file = folder / IDENTITY
    try:
        return file.read_text().strip()
    except FileNotFoundError:
        fresh = folder / f"{IDENTITY}.new"
        fresh.write_text(f"{new_id()}\n")
        fresh.replace(file)
        return file.read_text().strip()


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.chown(folder, UID, UID)
    except PermissionError:
        folder.chmod(0o777)  # what it is in can be entered by this user alone
