"""Where tools act, and whether a call that another process has begun there can be taken up."""

from __future__ import annotations

from typing import Protocol

from agent_sdk.workspace import Workspace


class Place(Protocol):
    """The workspace of a conversation as something that is lost one day and replaced by another."""

    @property
    def instance(self) -> str:
        """Names what calls begin in from now on, until it is lost. It is written down with every call."""
        ...

    def again(self, instance: str) -> Workspace | None:
        """Return the workspace as it was then, which knows what has begun in it; None: that one is gone.

        Lost later, its calls raise OutcomeUnknown instead of beginning in the next one.
        """
        ...


class Passing:
    """A workspace that ends with the process that uses it, or does not know what others have begun in it."""

    instance = ""

    def again(self, instance: str) -> Workspace | None:
        """See Place.again."""
        return None
