"""The sandboxes of a server: made, found again, and some that wait for an owner.

Where there were sandboxes before, or some are to wait for owners, the engine is connected to at once: something may be
left to sweep. A box that waits has no identity yet: whoever needs one of its kind takes it, gives it theirs, and waits
for nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

from msgspec.structs import replace

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.protocol.methods.workspace import SnapshotTaken
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.remote.connection import connect
from agent_sdk.workspace.disk import in_thread
from workspaces.backend import labels, sandbox_files
from workspaces.backend.contract import Backend
from workspaces.backend.sweep import Sweep
from workspaces.box.container import BoxContainer
from workspaces.box.contract import Box
from workspaces.box.folder import Record
from workspaces.box.host import IDENTITY, NOBODY, SandboxHost, SandboxOptions, Tell

__all__ = ["IDENTITY", "NOBODY", "SandboxOptions", "Sandboxes"]

AGAIN_SECONDS = 15.0
"""Between two tries to reach an engine; and between two looks at which boxes are missing, when a start has failed."""


class Sandboxes:
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
        self.host = SandboxHost(folder, options, tell, self._opened)
        self._tell = tell
        self._knows_some = folder / IDENTITY
        self._pool: Pool | None = None
        self._attending: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Sandboxes of {self.host}>"

    async def __aenter__(self) -> Self:
        await in_thread(self._forget_nobodys)
        if self.host.options.pool or self._knows_some.exists():
            self._attending = asyncio.create_task(self._attend())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await cancel_and_wait(self._attending)
        await self.host.close()

    @property
    def instance(self) -> str:
        """Which server owns them: a label of all its containers. Empty while there was none."""
        return self.host.instance

    async def admit(self, spec: Sandbox) -> Backend:
        """Check whether there could be such a sandbox now, and return where it would be.

        Raises:
            EngineUnavailable: there is no engine.
            IsolationUnavailable: its workspace cannot have the limit that was asked for.
            InvalidParams: there is no such snapshot, or the size makes no sense.
        """
        backend = await self.host.backend()
        await self.host.check(spec)
        return backend

    def box(self, owner: str, spec: Sandbox, instance: str) -> Box:
        """Return the box for this owner, not started."""
        return BoxContainer(self.host, owner, spec, instance=instance, waiting=self._waiting)

    def recorded(self, owner: str) -> Record | None:
        """Return what a former server noted of the container it has left, living or dead."""
        return self.host.folder(owner).read()

    async def find(self, owner: str) -> Box | None:
        """Return that box; one that has ended is `ended`, and wants to be cleaned up.

        Raises:
            EngineUnavailable: nobody knows whether it lives.
        """
        return await BoxContainer.find(self.host, owner)

    async def forget(self, owner: str) -> None:
        """Remove the workspace of an owner for good; nothing runs in it any more."""
        await self.host.disks.remove(owner)

    def has_files(self, owner: str) -> bool:
        """Whether something may be in the workspace of an owner; what is on a disk is not looked at. Blocks."""
        if self.host.disks.image(owner).exists():
            return True
        folder = self.host.disks.folder(owner)
        try:
            return folder.exists() and sandbox_files.size(folder) > 0
        except OSError:
            return True

    async def snapshot(self, owner: str) -> SnapshotTaken:
        """Copy the files of an owner; nothing may write them meanwhile."""
        return await self.host.snapshots.take(owner)

    # --- how ---

    def _waiting(self, owner: str, spec: Sandbox) -> BoxContainer | None:
        """A box that runs already, for an owner who has no workspace yet."""
        return None if self._pool is None or self.host.disks.has(owner) else self._pool.take(spec)

    def _nobodys(self, spec: Sandbox) -> BoxContainer:
        instance = new_id()
        return BoxContainer(self.host, f"{NOBODY}{instance}", spec, instance=instance)

    async def _attend(self) -> None:
        while True:
            try:
                await self.host.backend()
            except (AgentServerError, OSError) as exc:
                self._tell("engine_unavailable", {"problem": str(exc)})
            else:
                return
            await asyncio.sleep(AGAIN_SECONDS)

    @asynccontextmanager
    async def _opened(self, backend: Backend) -> AsyncIterator[None]:
        """Sweep, and have boxes wait, as long as there is a backend."""
        sweep = Sweep(
            backend,
            {labels.INSTANCE: self.instance},
            self._owned,
            on_removed=lambda name: self._tell("swept", {"name": name}),
            on_problem=lambda exc: self._tell("sweep_failed", {"problem": str(exc)}),
        )
        pool = Pool(
            self.host.options.pool,
            self._nobodys,
            on_ready=lambda image: self._tell("box_waits", {"image": image}),
            on_problem=lambda exc: self._tell("pool_not_filled", {"problem": str(exc)}),
        )
        async with sweep, pool:
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None

    def _owned(self) -> set[str]:
        """The containers on record. Blocks."""
        records = [folder.read() for folder in self.host.folders()]
        return {record.container for record in records if record is not None}

    def _forget_nobodys(self) -> None:
        """Forget the boxes that waited when a former server ended: the sweep finds what is left of them. Blocks."""
        for folder in self.host.folders(f"{NOBODY}*"):
            folder.remove()


class Pool:
    """Entering begins to fill it, leaving ends all that nobody has taken."""

    def __init__(
        self,
        wanted: Mapping[str, int],
        make: Callable[[Sandbox], BoxContainer],
        *,
        on_ready: Callable[[str], None],
        on_problem: Callable[[Exception], None],
    ) -> None:
        """Say what is to wait.

        Args:
            wanted: how many boxes of which image.
            make: makes a box that has not started and has no owner.
            on_ready: told of the image of each that waits.
            on_problem: told why one could not be started; that is tried again.
        """
        self._wanted = wanted
        self._make = make
        self._on_ready = on_ready
        self._on_problem = on_problem
        self._waiting: dict[BoxContainer, AsyncExitStack] = {}
        """In the order of their starts; each with a connection, so that it does not think it was forgotten."""
        self._taken = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Pool: {len(self._waiting)} of {sum(self._wanted.values())} wait>"

    async def __aenter__(self) -> Self:
        if self._wanted:
            self._filling = asyncio.create_task(self._fill())
        return self

    async def __aexit__(self, *exc: object) -> None:
        await cancel_and_wait(self._filling)
        for box in list(self._waiting):
            self._later(self._end(box))
        if self._ending:
            await asyncio.wait(self._ending)

    def take(self, spec: Sandbox) -> BoxContainer | None:
        """Return a box that is what was asked for, but for what an owner brings; it belongs to the caller now."""
        for box, company in self._waiting.items():
            if not box.ended.done() and spec.pull != "always" and _kind(spec) == box.spec:
                del self._waiting[box]
                self._later(company.aclose())
                self._taken.set()
                return box
        return None

    def waiting(self, image: str) -> int:
        """How many boxes of an image wait."""
        return sum(box.spec.image == image and not box.ended.done() for box in self._waiting)

    async def _fill(self) -> None:
        while True:
            self._taken.clear()
            for image, count in self._wanted.items():
                try:
                    while self.waiting(image) < count:
                        await self._add(Sandbox(image=image))
                except (AgentServerError, OSError) as exc:
                    self._on_problem(exc)
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_SECONDS):
                    await self._taken.wait()

    async def _add(self, spec: Sandbox) -> None:
        box = self._make(spec)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(box.end)
            await box.launch()
            company = await stack.enter_async_context(AsyncExitStack())
            await company.enter_async_context(connect(box.url))
            stack.pop_all()
        self._waiting[box] = company
        box.ended.add_done_callback(lambda _: self._died(box))
        self._on_ready(spec.image)

    def _died(self, box: BoxContainer) -> None:
        if box in self._waiting:
            self._later(self._end(box))

    async def _end(self, box: BoxContainer) -> None:
        company = self._waiting.pop(box, None)
        if company is not None:
            await company.aclose()
        await box.end()

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _kind(spec: Sandbox) -> Sandbox:
    """What cannot be changed any more once a box runs."""
    return replace(spec, env={}, idle_ttl=None, pull="missing")
