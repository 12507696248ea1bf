"""The points at which somebody is killed, and the way there and on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, OutcomeUnknown, WorkspaceUnavailable
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.remote.link import ask
from agent_sdk.workspace.contract import ExecResult
from tests.chaos.server import KEY, Server
from tests.contract.commands import Listener
from tests.docker import images
from tests.docker.held_engine import HeldEngine
from tests.docker.leaks import nothing_is_left_of
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine

CREATE, START = ("POST", "/containers/create"), ("POST", "/containers/[^/]+/start")
STOPPING = ("POST", "/containers/[^/]+/stop", "asked")
ENDING = ("DELETE", "/containers/[^/]+", "asked")
Point = tuple[str, str, str] | None
RUNNING: Point = None
"""Not a call: a command runs."""
STARTING: dict[str, Point] = {
    "the container is about to be created": (*CREATE, "asked"),
    "the container was created": (*CREATE, "answered"),
    "the container is about to start": (*START, "asked"),
    "the container has started": (*START, "answered"),
    "a command runs": RUNNING,
}
COMMAND = "echo begun; until [ -e go ]; do sleep 0.1; done; echo ended"
ENDED = "begun\nended\n"
SECONDS = 60


class Use(NamedTuple):
    """A sandbox in which a command runs, or is about to."""

    workspace: RemoteWorkspace
    heard: Listener
    command: asyncio.Task[ExecResult]

    async def outcome(self) -> str:
        """What the command said at its end; or the kind of error when nobody knows what became of it."""
        async with asyncio.timeout(SECONDS):
            while not self.command.done():
                with suppress(AgentServerError):  # it may be what the death is noticed by
                    await self.workspace.files.write("/workspace/go", b"")
                await asyncio.wait([self.command], timeout=1)
            try:
                result = self.command.result()
            except AgentServerError as exc:
                return exc.kind
        return result.stdout if result.status == "exited" else result.status

    async def still_works(self) -> None:
        """Commands run; the first call may be told of a death that it is the first to notice."""
        async with asyncio.timeout(SECONDS):
            with suppress(OutcomeUnknown, WorkspaceUnavailable):
                await self.workspace.execute("true")
            assert (await self.workspace.execute("echo works")).stdout == "works\n"

    async def delete(self) -> None:
        await ask(self.workspace.link, Delete(op_id=new_id()))


@asynccontextmanager
async def used(server: Server) -> AsyncIterator[Use]:
    """A sandbox of this server in which a command is called."""
    url = f"http://127.0.0.1:{server.port}"
    heard, sandbox = Listener(), Sandbox(image=images.BUSYBOX)
    place = RemoteWorkspace(url, KEY, sandbox=sandbox, connect_timeout=SECONDS, reconnect_timeout=SECONDS)
    async with place as workspace:
        command = asyncio.create_task(workspace.execute(COMMAND, on_output=heard))
        try:
            yield Use(workspace, heard, command)
        finally:
            command.cancel()
            await asyncio.wait([command])


async def reached(point: Point, held: HeldEngine, use: Use) -> None:
    if point is RUNNING:
        await use.heard.hears(b"begun\n")
    else:
        await held.reached()


async def nothing_is_left(engine: Engine, server: Server) -> None:
    """Of a server whose conversations are deleted: first while it lives, then of itself."""
    instance = (server.data / "instance").read_text().strip()
    await nothing_is_left_of(engine, {labels.INSTANCE: instance})
    assert await server.stop() == 0
    await nothing_is_left_of(engine, {labels.INSTANCE: instance}, str(server.folder))
    folders = ("boxes", "condemned", "disks", "output", "workspaces")
    left = [str(path) for name in folders for path in (server.data / name).glob("*")]
    assert not left, f"left in the data folder: {left}"
