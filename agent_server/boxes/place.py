"""The boxes of a workspace as the place where an agent's tools act."""

from __future__ import annotations

import asyncio

from agent_sdk.agent.runtime import Place
from agent_sdk.protocol.errors import OutcomeUnknown
from agent_sdk.protocol.results import Wait, WorkspaceInfo
from agent_sdk.remote.link import Linked
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace.contract import Workspace
from agent_server.boxes.link import BoxLink
from agent_server.boxes.watch import STARTS


class BoxPlace(Place):
    """The boxes of a workspace as the place where an agent's tools act."""

    def __init__(self, link: BoxLink, clients_back: asyncio.Event) -> None:
        """Take the boxes, and what is set when the clients are there again that the last server let go of."""
        self._link = link
        self._clients_back = clients_back

    @property
    def instance(self) -> str:
        return self._link.named()

    @property
    def waits(self) -> tuple[Wait, ...]:
        return (Wait(what="box", reason=STARTS),) if self._link.is_starting else ()

    async def describe(self, workspace: Workspace) -> WorkspaceInfo:
        return self._link.where or await workspace.describe()

    def untouched(self, instance: str) -> bool:
        return instance == self._link.instance and self._link.untouched

    def again(self, instance: str) -> RemoteWorkspace | None:
        return RemoteWorkspace.over(_Same(self._link, instance)) if instance == self._link.instance else None

    async def ready(self) -> None:
        """Return when something new may begin there: what clients asked for while there was no server comes first."""
        await self._clients_back.wait()


class _Same:
    """A link.Link to one box and no other."""

    def __init__(self, link: BoxLink, instance: str) -> None:
        self._link = link
        self._instance = instance

    async def linked(self) -> Linked:
        linked = await self._link.again(self._instance)
        if linked is None:
            raise OutcomeUnknown("the box in which it ran was lost; whether it was done is not known")
        return linked
