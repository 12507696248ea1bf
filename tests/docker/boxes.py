"""Boxes in containers without a server around them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from agent_sdk import RemoteWorkspace, Sandbox
from agent_sdk.ids import new_id
from tests.docker.images import BUSYBOX
from tests.server.wire import GUARD
from workspaces.backend import labels
from workspaces.box.sandboxes import Sandboxes, SandboxOptions


class Told:
    """What the sandboxes of a server tell, and whoever waits for it."""

    def __init__(self):
        self.events = []
        self._more = asyncio.Event()

    def __call__(self, event, facts):
        self.events.append((event, facts))
        self._more.set()

    async def times(self, count, wanted):
        async with asyncio.timeout(GUARD):
            while sum(event == wanted for event, _ in self.events) < count:
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def sandboxes_in(folder, runtimes, *, linger=120.0, **options):
    """The sandboxes of a data folder, and what they have `told`."""
    (folder / "boxes").mkdir(exist_ok=True)
    told = Told()
    given = SandboxOptions(runtimes=runtimes, linger=linger, **options)
    async with Sandboxes(folder, given, tell=told) as sandboxes:
        sandboxes.told = told
        yield sandboxes


@asynccontextmanager
async def box(sandboxes, owner="one", image=BUSYBOX, **wanted):
    """A box of this owner that has started."""
    box = sandboxes.box(owner, Sandbox(image=image, **wanted), new_id())
    try:
        await box.start()
        yield box
    finally:
        await box.end()


async def said(box, command):
    async with RemoteWorkspace(box.url, box.token) as workspace:
        return (await workspace.execute(command)).stdout


async def containers(engine, sandboxes, owner=None):
    found = await engine.containers({labels.INSTANCE: sandboxes.instance})
    return [each for each in found if owner is None or each["Labels"][labels.CONVERSATION] == owner]
