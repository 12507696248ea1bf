"""Sandboxes of a server, for tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from agent_sdk import Conversation, RemoteWorkspace, Sandbox
from agent_sdk.protocol.events import WorkspaceChanged
from tests.docker.images import BUSYBOX
from tests.server.wire import GUARD
from workspaces.backend import labels


@asynccontextmanager
async def sandbox(server, image=BUSYBOX, **wanted):
    async with RemoteWorkspace(server.url, server.key, sandbox=Sandbox(image=image, **wanted)) as workspace:
        yield workspace


async def container(engine, workspace):
    """The engine's account of the container of this workspace."""
    (found,) = await engine.containers({labels.CONVERSATION: workspace.conversation})
    return await engine.inspect(found["Id"])


async def told(workspace, *wanted):
    """Wait until the log tells of these changes, each a state and its cause (None: any); returns the last event."""
    waiting = list(wanted)
    async with asyncio.timeout(GUARD), Conversation(None, workspace, id=workspace.conversation) as log:
        async for event in log.events(follow=True):
            if (
                isinstance(event, WorkspaceChanged)
                and event.state == waiting[0][0]
                and waiting[0][1] in (None, event.cause)
            ):
                waiting.pop(0)
                if not waiting:
                    return event
    raise AssertionError("the log ended")
