"""What the sandboxes of a server share, as each of them sees it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from agent_sdk.protocol.specs import Sandbox
from workspaces.backend.docker.profiles import Propagation

if TYPE_CHECKING:
    from workspaces.backend.docker.accounts import Accounts
    from workspaces.backend.docker.engine import Engine, Image
    from workspaces.box.folder import BoxFolder
    from workspaces.box.runtime import BoxRuntime


class Places(Struct, frozen=True):
    """Where a sandbox keeps its files, as the engine's machine names the folders."""

    workspace: str
    output: str
    temporary: tuple[str, ...]
    """As many as were asked for, empty."""
    folder: str
    """Of the box: its socket."""
    etc: str
    """Of the box: what is mounted over files of the image."""
    runtime: str
    size: int = 0
    """Bytes of the workspace; 0: no limit."""
    propagation: Propagation = "rprivate"


class Site(Protocol):
    """What sandboxes of a server share."""

    async def engine(self) -> Engine:
        """Return the engine. Raises EngineUnavailable."""
        ...

    async def runtime(self) -> BoxRuntime:
        """Return the box runtime. Raises WorkspaceUnavailable."""
        ...

    def labels(self, owner: str) -> dict[str, str]:
        """Return the labels of a container for this owner."""
        ...

    def at_hand(self, owner: str, spec: Sandbox, temporary: int) -> AbstractAsyncContextManager[Places]:
        """Have the places of an owner for as long as a container starts; they are made where they are missing.

        Args:
            owner: whose they are.
            spec: how large they may be.
            temporary: how many empty folders besides, which have one limit together.
        """
        ...

    async def accounts(self, image: Image) -> Accounts:
        """Return the users of an image. Raises as `accounts.accounts`."""
        ...

    async def tidy(self, owner: str) -> None:
        """Remove what a container of this owner leaves behind, but for its workspace."""
        ...

    async def hand_over(self, owner: str, to: str) -> BoxFolder:
        """Give all files of an owner who is nobody yet to somebody who has none."""
        ...

    def disk(self, owner: str) -> tuple[str, int | None, int | None]:
        """Return what limits the workspace of an owner, the bytes it occupies and those it may."""
        ...

    @property
    def linger(self) -> float:
        """Seconds that a box goes on without any connection."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of all commands."""
        ...

    @property
    def allowed_mounts(self) -> tuple[str, ...]:
        """Folders of this machine of which parts may be mounted."""
        ...

    @property
    def preferred_runtime(self) -> str:
        """Of the engine, for sandboxes that name none."""
        ...
