"""The boxes of a server: started at their first use, found again after a restart, ended or kept at its stop.

Each has a folder named after its owner, the conversation whose workspace it is. box_link is the way to one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Self

from agent_sdk.box.process import RECORD
from agent_sdk.protocol.errors import EngineUnavailable, Overloaded
from agent_sdk.protocol.events import WorkspaceChanged
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import Sandbox
from agent_server.boxes.link import ANSWER_SECONDS, BoxLink, Change
from agent_server.boxes.name import BoxName
from agent_server.config.options import ServerConfig
from agent_server.data_folder import DataFolder
from agent_server.logs import Logs
from agent_server.work import RETRY_AFTER_MS
from workspaces.backend.contract import WORKSPACE
from workspaces.box.folder import Record
from workspaces.box.process import BoxProcess
from workspaces.box.sandboxes import Sandboxes, SandboxOptions

FOUND_AT_ONCE = 32
UNUSED = WorkspaceChanged(state="lost", reason="it ended while nobody used it")

OnChange = Callable[[], None]


class Boxes:
    """The boxes of a server. Entering finds those of the server before this one."""

    def __init__(
        self,
        config: ServerConfig,
        folder: DataFolder,
        logs: Logs,
        on_change: OnChange,
        *,
        patience: float = ANSWER_SECONDS,
    ) -> None:
        """Take what boxes need.

        Args:
            config: says what they inherit, how long they linger, and whether they are kept.
            folder: where theirs are.
            logs: told of their starts and ends.
            on_change: called when one has started or ended.
            patience: seconds after which a box that does not answer counts as hanging.
        """
        self._config = config
        self._folder = folder
        self._logs = logs
        self._on_change = on_change
        self._patience = patience
        self._links: dict[str, BoxLink] = {}
        self.sandboxes = Sandboxes(
            folder.root,
            SandboxOptions(
                engine=config.engine or None,
                runtime=config.sandbox_runtime,
                linger=config.box_linger_seconds,
                environment=config.command_env,
                runtimes=config.box_runtimes,
                disk=config.sandbox_disk_bytes,
                mounts=config.sandbox_mounts,
                pool=config.sandbox_pool,
            ),
            tell=lambda event, facts: logs.log.info(event, **facts),
        )

    def __repr__(self) -> str:
        return f"<Boxes: {self.running} running>"

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._folder.boxes.mkdir, mode=0o700, exist_ok=True)
        await self.sandboxes.__aenter__()
        turn = asyncio.Semaphore(FOUND_AT_ONCE)
        await asyncio.gather(*(self._find(place, turn) for place in self._folder.boxes.iterdir()))
        await asyncio.to_thread(self._remove_output, set(self._links))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all boxes, or those that run nothing where the others are to be kept."""
        for failure in await asyncio.gather(
            *(self._stop(link) for link in self._links.values()), return_exceptions=True
        ):
            if isinstance(failure, Exception):
                self._logs.log.error("box_not_stopped", problem=str(failure))
        await self.sandboxes.__aexit__()

    @property
    def running(self) -> int:
        """How many boxes there are."""
        return sum(link.is_running for link in self._links.values())

    def link_of(self, owner: str) -> BoxLink | None:
        """Return the way to the box of this owner, where somebody has asked for it before."""
        return self._links.get(owner)

    def link(self, owner: str, root: Path | None = None) -> BoxLink:
        """Return the way to the box of this owner; `root`: the folder of its workspace."""
        link = self._links.get(owner)
        if link is None:
            root = root or self._folder.workspace(owner)
            link = self._links[owner] = BoxLink(
                partial(self._box, owner, root),
                partial(self._tell, owner),
                self._name(owner),
                admit=self._admit,
                patience=self._patience,
                where=_where(os.path.realpath(self._config.files_root or root), os.path.realpath(root)),
            )
        return link

    def sandbox(self, owner: str, spec: Sandbox) -> BoxLink:
        """Return the way to the sandbox of this owner."""
        link = self._links.get(owner)
        if link is None:
            link = self._links[owner] = BoxLink(
                partial(self.sandboxes.box, owner, spec),
                partial(self._tell, owner),
                self._name(owner),
                admit=self._admit,
                patience=self._patience,
                idle=self._idle(spec),
                where=None if spec.profile == "task" else _where("/", WORKSPACE, spec.platform),
            )
        return link

    def _idle(self, spec: Sandbox) -> float:
        if spec.idle_ttl is not None:
            return spec.idle_ttl
        # What commands of a task write into its root goes with the container.
        return inf if spec.profile == "task" else self._config.idle_seconds

    async def forget(self, owner: str) -> None:
        """End the box of this owner for good."""
        link = self._links.pop(owner, None)
        if link is not None:
            await link.close()
        self._name(owner).forget()

    def _name(self, owner: str) -> BoxName:
        return BoxName(self._folder.names / owner)

    async def _find(self, place: Path, turn: asyncio.Semaphore) -> None:
        async with turn:
            record = self.sandboxes.recorded(place.name)
            if record is not None:
                await self._find_sandbox(place.name, record)
                return
            died = (place / RECORD).exists()
            box = await BoxProcess.find(place, self._folder.output / place.name, self._folder.confinement)
            if box is not None:
                await self.link(place.name).adopt(box, self._config.box_linger_seconds)
            elif died:
                self.link(place.name).events.untold = UNUSED

    async def _find_sandbox(self, owner: str, record: Record) -> None:
        link = self.sandbox(owner, record.spec)
        try:
            box = await self.sandboxes.find(owner)
        except EngineUnavailable as exc:
            self._logs.log.warning("sandbox_not_found", box=owner, problem=str(exc))
            link.expect(record.instance)
            return
        if box is not None and not box.ended.done():
            await link.adopt(box, self._config.box_linger_seconds)
        elif box is not None:
            if record.claimed:
                link.events.untold = WorkspaceChanged(state="lost", reason=box.last_words(), cause=box.cause)
            await box.end()

    async def _stop(self, link: BoxLink) -> None:
        keep = self._config.boxes_on_stop == "keep" and (link.lasts or not await link.idle())
        await link.close(keep=keep)

    def _admit(self) -> None:
        if (running := self.running) >= (limit := self._config.max_boxes):
            raise Overloaded(
                f"limit {limit} boxes run; call again when one has ended",
                reason="boxes run",
                limit=limit,
                got=running,
                retry_after_ms=RETRY_AFTER_MS,
            )

    def _box(self, owner: str, root: Path, instance: str) -> BoxProcess:
        whole = self._config.files_root
        return BoxProcess(
            Path(whole) if whole else root,
            self._folder.boxes / owner,
            spool=self._folder.output / owner,
            working_dir=root if whole else None,
            linger=self._config.box_linger_seconds,
            environment=self._config.box_environment,
            instance=instance,
            confinement=self._folder.confinement,
        )

    def _remove_output(self, but: set[str]) -> None:
        """Remove what boxes left that are gone."""
        if self._folder.output.is_dir():
            for place in self._folder.output.iterdir():
                if place.name not in but:
                    self._folder.confinement.remove(place)

    def _tell(self, owner: str, change: Change, words: str) -> None:
        self._on_change()
        if words or change == "lost":
            self._logs.log.warning(f"box_{change}", box=owner, last_words=words)
        else:
            self._logs.log.info(f"box_{change}", box=owner)


def _where(root: str, working_dir: str, platform: str | None = None) -> WorkspaceInfo:
    """What is known of a box before there is one."""
    machine = os.uname()
    return WorkspaceInfo(
        root=root,
        working_dir=working_dir,
        platform=platform or f"{machine.sysname}-{machine.release}-{machine.machine}",
        python="",
        confined=True,
    )
