"""Where tools act, and whether a call that another process has begun there can be taken up."""

from __future__ import annotations

from typing import Protocol

from agent_sdk.protocol.results import Wait, WorkspaceInfo
from agent_sdk.workspace.contract import Workspace


class Place(Protocol):
    """The workspace of a conversation as something that is lost one day and replaced by another."""

    @property
    def instance(self) -> str:
        """The name of the box in which calls begin from now on, until it is lost; written down with every call."""
        ...

    @property
    def waits(self) -> tuple[Wait, ...]:
        """What tools that act there wait for now."""
        ...

    async def describe(self, workspace: Workspace) -> WorkspaceInfo:
        """Return what an agent is told of where it is; nothing is started for that."""
        ...

    def untouched(self, instance: str) -> bool:
        """Whether it is certain that nothing has begun that was written down with this name."""
        ...

    def again(self, instance: str) -> Workspace | None:
        """Return the workspace as it was then, which knows what has begun in it; None: that one is gone.

        Lost later, its calls raise OutcomeUnknown instead of beginning in the next one.
        """
        ...

    async def ready(self) -> None:
        """Return when something new may begin there; what has begun goes on meanwhile."""
        ...


class Passing(Place):
    """A workspace that ends with the process that uses it, or does not know what others have begun in it."""

    instance = ""
    waits = ()

    async def describe(self, workspace: Workspace) -> WorkspaceInfo:
        return await workspace.describe()

    def untouched(self, instance: str) -> bool:
        return False

    def again(self, instance: str) -> Workspace | None:
        return None

    async def ready(self) -> None:
        """Return at once."""
