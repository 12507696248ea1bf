"""The boxes of a server: started at their first use, found again after a restart, ended or kept at its stop.

Each has a folder named after its owner, the conversation whose workspace it is. `BoxLink` is the way to
one: it leads to the box that lives, and when that was lost or let go of, to the next one.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from agent_sdk.box import RECORD
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, OutcomeUnknown, Overloaded, WorkspaceUnavailable
from agent_sdk.protocol.methods import Describe
from agent_sdk.remote.connection import connect
from agent_sdk.remote.link import Linked
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.rpc.peer import Peer
from agent_server.config import ServerConfig
from agent_server.data_folder import DataFolder
from agent_server.logs import Logs
from agent_server.work import RETRY_AFTER_MS
from workspaces.box_process import BoxProcess

FOUND_AT_ONCE = 32
ANSWER_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""At least between two looks at a box that is to end as soon as no call runs in it."""

Change = Literal["started", "found", "ended", "left", "lost"]
"""`found`: it was there before this server; `left`: it goes on without it."""
OnChange = Callable[[], None]


class Boxes:
    """See the module's docstring. Entering finds the boxes of the server before this one."""

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

    def __repr__(self) -> str:
        return f"<Boxes: {self.running} running>"

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._folder.boxes.mkdir, mode=0o700, exist_ok=True)
        turn = asyncio.Semaphore(FOUND_AT_ONCE)
        await asyncio.gather(*(self._find(place, turn) for place in self._folder.boxes.iterdir()))
        await asyncio.to_thread(_remove_all, self._folder.output, set(self._links))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all boxes, or those that run nothing where the others are to be kept."""
        await asyncio.gather(*(self._stop(link) for link in self._links.values()))

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
            link = self._links[owner] = BoxLink(
                partial(self._box, owner, root or self._folder.workspace(owner)),
                partial(self._tell, owner),
                admit=self._admit,
                patience=self._patience,
            )
        return link

    async def forget(self, owner: str) -> None:
        """End the box of this owner for good."""
        link = self._links.pop(owner, None)
        if link is not None:
            await link.close()

    async def _find(self, place: Path, turn: asyncio.Semaphore) -> None:
        async with turn:
            died = (place / RECORD).exists()
            box = await BoxProcess.find(place, self._folder.output / place.name)
            if box is not None:
                await self.link(place.name).adopt(box, self._config.box_linger_seconds)
            elif died:
                self.link(place.name).died = True

    async def _stop(self, link: BoxLink) -> None:
        keep = self._config.boxes_on_stop == "keep" and not await link.idle()
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
        return BoxProcess(
            root,
            self._folder.boxes / owner,
            spool=self._folder.output / owner,
            linger=self._config.box_linger_seconds,
            environment=self._config.box_environment,
            instance=instance,
        )

    def _tell(self, owner: str, change: Change, words: str) -> None:
        self._on_change()
        if change == "lost":
            self._logs.log.warning("box_lost", box=owner, last_words=words)
        else:
            self._logs.log.info(f"box_{change}", box=owner)


class BoxLink:
    """A link.Link to the box of one workspace. Several conversations may share one."""

    def __init__(
        self,
        make: Callable[[str], BoxProcess],
        tell: Callable[[Change, str], None],
        *,
        admit: Callable[[], None] = lambda: None,
        patience: float = ANSWER_SECONDS,
    ) -> None:
        """Describe the way; nothing starts before it is used.

        Args:
            make: makes a box of this name (`instance`), not started yet.
            tell: called when a box is there or is not any more; with its last words.
            admit: raises when there are boxes enough.
            patience: seconds after which a box that does not answer counts as hanging.
        """
        self.instance = new_id()
        """Of the box that lives, or of the next one."""
        self.survived = False
        """Whether the box was there before this server."""
        self.died = False
        """Whether it was lost while nobody listened; for whoever tells it, once."""
        self.owing = False
        """Whether a result may be in the box and nowhere else."""
        self._make = make
        self._tell = tell
        self._admit = admit
        self._patience = patience
        self._listeners: dict[object, Callable[[str], None]] = {}
        self._linked: Linked | None = None
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the state has changed, with the reason when a box did not start."""
        self._keeper: asyncio.Task[None] | None = None
        self._let_go: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unused: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None
        self._uses = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<BoxLink {self.instance} {'running' if self.is_running else 'at rest'}>"

    @property
    def is_running(self) -> bool:
        """Whether there is a box, or one is starting."""
        return self._keeper is not None and not self._let_go.done()

    def on_lost(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call `listener` with the reason whenever the box is lost; returns how to stop that."""
        key = object()
        self._listeners[key] = listener
        return lambda: self._listeners.pop(key, None) and None

    async def linked(self) -> Linked:
        """See Link; starts the box when there is none. Cancelling does not stop its start.

        Raises:
            WorkspaceUnavailable, PathNotFound: it did not start, or the workspace is closed.
            Overloaded: it would have to be started, and there are boxes enough.
        """
        self._use()
        while True:
            if self._linked is not None and self._linked.peer.lost is None:
                return self._linked
            if self._keeper is None:
                self._begin(None)
            await asyncio.shield(self._news)

    async def again(self, instance: str) -> Linked | None:
        """Like `linked`, but to this box or to none: None when it is gone."""
        self._use()
        while self.instance == instance:
            if self._linked is not None and self._linked.peer.lost is None:
                return self._linked
            if self._keeper is None:
                self._begin(None)
            await asyncio.shield(self._news)
        return None

    async def adopt(self, box: BoxProcess, linger: float) -> None:
        """Take over a box that was found; one that does not answer is ended.

        Args:
            linger: seconds after which it is ended when nobody has come back to it and no call runs in it.
        """
        self.instance = box.instance
        self._begin(box)
        self._rest(linger)
        await asyncio.wait([self._news])
        self.survived = self._linked is not None

    async def operations(self) -> frozenset[str]:
        """Return the op_ids of the calls that run in the box. To ask is not to use it.

        Raises:
            ConnectionLost, TimedOut: it does not answer.
        """
        if self._linked is None:
            return frozenset()
        return frozenset((await self._linked.peer.call(Describe(), timeout=self._patience)).operations)

    async def retire(self, seconds: float) -> None:
        """End the box that nobody uses; while a call runs in it, look again every so many seconds."""
        if self.is_running:
            await self._look(seconds)
        if self._let_go.done():
            await self.release()

    async def idle(self) -> bool:
        """Whether nothing runs in the box, no call and no shell is open in it, and it owes no result."""
        if not self.is_running:
            return True
        try:
            linked = await self.linked()
            info = await linked.peer.call(Describe(), timeout=self._patience)
        except AgentServerError:
            return False
        return not (self.owing or info.running or info.operations)

    async def release(self, *, keep: bool = False) -> None:
        """End the box with all that runs in it, or leave it to itself; the next use starts another one then."""
        if self._keeper is not None:
            if not self._let_go.done():
                self._let_go.set_result(keep)
            await asyncio.wait([self._keeper])

    async def close(self, *, keep: bool = False) -> None:
        """Like `release`; the way cannot be used any more."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        await self.release(keep=keep)

    def _use(self) -> None:
        self._uses += 1
        if self._unused is not None:
            self._unused.cancel()

    def _rest(self, seconds: float) -> None:
        def look() -> None:
            self._looking = asyncio.create_task(self._look(seconds))

        self._unused = asyncio.get_running_loop().call_later(seconds, look)

    async def _look(self, seconds: float) -> None:
        """End the box if no call runs in it, and nobody comes back meanwhile."""
        uses = self._uses
        try:
            busy = bool(await self.operations())
        except AgentServerError:  # whoever uses it next finds out what it has
            busy = True
        if uses != self._uses or not self.is_running:
            return
        if busy:
            self._rest(max(seconds, LOOK_SECONDS))
        else:
            self._let_go.set_result(False)

    # --- one box, from its start to its end ---

    def _begin(self, box: BoxProcess | None) -> None:
        if self._closed:
            raise WorkspaceUnavailable("the workspace is closed", phase="closed")
        if box is None:
            self._admit()
        self._let_go = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(box))

    async def _keep(self, box: BoxProcess | None) -> None:
        change: Change = "ended"
        error: Exception | None = None
        found, box = box is not None, box or self._make(self.instance)
        try:
            if not found:
                await box.start()
            change = await self._stay(box, "found" if found else "started")
        except Exception as exc:  # noqa: BLE001  whoever waits for the box gets it, whatever it is
            change, error = ("lost", None) if self._linked or found else ("ended", exc)
        words = box.last_words() if change == "lost" else ""
        if self._unused is not None:
            self._unused.cancel()
        if self._let_go.done() and self._let_go.result():
            box.let_go()
            change = "left"
        else:
            await box.end()
        self._linked, self._keeper = None, None
        self.died = change == "lost" and not self._listeners
        self.instance, self.survived, self.owing = new_id(), False, False
        self._turn(error)
        self._tell(change, words)
        if change == "lost":
            for listener in list(self._listeners.values()):
                listener(words)

    async def _stay(self, box: BoxProcess, begins: Change) -> Change:
        """Stay connected until the box is not wanted any more or has ended by itself; returns which."""
        while True:
            async with AsyncExitStack() as stack:
                peer = await _connect(stack, box, self._patience)
                first = self._linked is None
                self._linked = Linked(peer, box.instance)
                self._turn()
                if first:
                    self._tell(begins, "")
                closed = asyncio.ensure_future(peer.wait_closed())
                reasons: list[asyncio.Future[Any]] = [closed, box.ended, self._let_go]
                try:
                    await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    closed.cancel()
                    await asyncio.gather(closed, return_exceptions=True)
            if self._let_go.done():
                return "ended"
            if box.ended.done():
                return "lost"

    def _turn(self, error: Exception | None = None) -> None:
        """Let all who wait look again."""
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        if error is None:
            news.set_result(None)
        else:
            news.set_exception(error)
            news.exception()  # those who waited may be gone


class BoxPlace:
    """A box as an agent's place: see place.Place."""

    def __init__(self, link: BoxLink) -> None:
        self._link = link

    @property
    def instance(self) -> str:
        """Of the box that lives, or of the next one."""
        return self._link.instance

    def again(self, instance: str) -> RemoteWorkspace | None:
        """See Place.again."""
        return RemoteWorkspace.over(_Same(self._link, instance)) if instance == self._link.instance else None


class _Same:
    """A link.Link to one box and no other."""

    def __init__(self, link: BoxLink, instance: str) -> None:
        self._link = link
        self._instance = instance

    async def linked(self) -> Linked:
        """See Link."""
        linked = await self._link.again(self._instance)
        if linked is None:
            raise OutcomeUnknown("the box in which it ran was lost; whether it was done is not known")
        return linked


async def _connect(stack: AsyncExitStack, box: BoxProcess, patience: float) -> Peer:
    """Connect; a box that does not answer is killed, because nothing can be had from it any more."""
    hanging = asyncio.get_running_loop().call_later(patience, box.kill)
    try:
        return (await stack.enter_async_context(connect(box.url))).peer
    finally:
        hanging.cancel()


def _remove_all(folder: Path, but: set[str]) -> None:
    """Remove what is in a folder, but for these names."""
    if folder.is_dir():
        for place in folder.iterdir():
            if place.name not in but:
                shutil.rmtree(place, ignore_errors=True)
