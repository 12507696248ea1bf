"""The way to the box of one workspace: to the one that lives, and when that was lost or let go of, to the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from math import inf
from typing import Any, Literal

from agent_sdk.agent.turn_state import is_left
from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.protocol.errors import (
    AgentServerError,
    EngineUnavailable,
    StateConflict,
    WorkspaceLost,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.events import WorkspaceChanged
from agent_sdk.protocol.methods.workspace import Describe, ProcessList
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.remote.connection import connect
from agent_sdk.remote.link import Linked
from agent_sdk.rpc.peer import Peer
from agent_server.boxes.name import BoxName
from agent_server.boxes.watch import BoxEvents, BoxWatch, told_if_long
from workspaces.box.contract import Box

ANSWER_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""At least between two looks at a box that is to end as soon as no call runs in it."""
BARREN_CONNECTIONS = 10
"""In a row, before anything came of them: a box that hangs up so often is killed."""

Change = Literal["started", "found", "ended", "left", "lost", "paused", "resumed"]
"""`found`: it was there before this server; `left`: it goes on without it."""


class BoxLink:
    """A link.Link to the box of one workspace. Several conversations may share one."""

    def __init__(
        self,
        make: Callable[[str], Box],
        tell: Callable[[Change, str], None],
        name: BoxName,
        *,
        admit: Callable[[], None] = lambda: None,
        patience: float = ANSWER_SECONDS,
        idle: float | None = None,
        where: WorkspaceInfo | None = None,
    ) -> None:
        """Describe the way; nothing starts before it is used.

        Args:
            make: makes a box of this name (`instance`), not started yet.
            tell: called when a box is there or is not any more; with its last words.
            name: of the box that lives, or of the next one.
            admit: raises when there are boxes enough.
            patience: seconds after which a box that does not answer counts as hanging.
            idle: of a sandbox: seconds without use until it is stopped. None: it is a plain process; of
                that, listeners hear of its loss alone.
            where: what is known of its boxes before there is one.
        """
        self.where = where
        self.survived = False
        """Whether the box was there before this server."""
        self.events = BoxEvents(sandbox=idle is not None)
        self.owing = False
        """Whether a call has begun in the box whose result is nowhere else."""
        self.awaited = False
        """Whether a call is written down that has not begun, for the box of this name."""
        self._name = name
        self._make = make
        self._tell = tell
        self._admit = admit
        self._patience = patience
        self._idle = idle
        self._box: Box | None = None
        self._linked: Linked | None = None
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the state has changed, with the reason when a box did not start."""
        self._keeper: asyncio.Task[None] | None = None
        self._let_go: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unused: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None
        self._frozen = False
        self._watch: BoxWatch | None = None
        self._freezing = asyncio.Lock()
        """Held by the one who freezes it, until it is frozen, or goes on after a copy."""
        self._held = False
        """Whether it is frozen for a moment, for a copy of its files."""
        self._thawing: asyncio.Task[None] | None = None
        self._uses = 0
        self._used_at = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<BoxLink {self.instance} {'running' if self.is_running else 'at rest'}>"

    @property
    def instance(self) -> str:
        """The name of the box that lives, or of the next one."""
        return self._name.value

    @property
    def untouched(self) -> bool:
        """Whether nothing has begun that was written down with this name."""
        return self._name.promised

    def named(self) -> str:
        """Return the name to be written down with a call that is about to begin in the box, or in the next one."""
        if self._linked is None and not self.survived:
            self._name.promise()
        return self.instance

    @property
    def is_running(self) -> bool:
        """Whether there is a box, or one is starting."""
        return self._keeper is not None and not self._let_go.done()

    @property
    def is_starting(self) -> bool:
        """Whether whoever uses it has to wait for a box that is not there yet."""
        return self.is_running and self._linked is None

    @property
    def lasts(self) -> bool:
        """Whether it is never stopped because nobody uses it: more than the workspace would be lost."""
        return self._idle == inf and self.is_running

    async def linked(self) -> Linked:
        """Return the connection: start the box when there is none, wake one that is frozen. Cancelling stops neither.

        Raises:
            WorkspaceUnavailable, PathNotFound: it did not start, or the workspace is closed.
            Overloaded: it would have to be started, and there are boxes enough.
        """
        linked = await self._lead(None)
        assert linked is not None
        return linked

    async def again(self, instance: str) -> Linked | None:
        """Like `linked`, but to this box or to none: None when it is gone."""
        return await self._lead(instance)

    async def _lead(self, instance: str | None) -> Linked | None:
        self.use()
        while instance in (None, self.instance):
            if self._linked is not None and self._linked.peer.lost is None:
                if not self._frozen:
                    return self._linked
                await self.resume()
                continue
            if self._keeper is None:
                self._begin(None)
            await asyncio.shield(self._news)
        return None

    async def adopt(self, box: Box, linger: float) -> None:
        """Take over a box that was found; one that does not answer is ended.

        Args:
            linger: seconds after which it is ended when nobody has come back to it and no call runs in it.
        """
        self._name.become(box.instance)
        self._begin(box)
        self._rest(linger)
        await asyncio.wait([self._news])
        self.survived = self._linked is not None

    def expect(self, instance: str) -> None:
        """The box of this name may live, but cannot be looked for now: it is at the next use."""
        self._name.become(instance)
        self.survived = True

    async def operations(self) -> frozenset[str]:
        """Return the op_ids of the calls that run in the box. To ask is not to use it.

        Raises:
            ConnectionLost, TimedOut, StateConflict: it does not answer, or is frozen.
        """
        if self._linked is None:
            return frozenset()
        if self._frozen:
            raise StateConflict("the workspace is paused", state="paused")
        return frozenset((await self._linked.peer.call(Describe(), timeout=self._patience)).operations)

    async def describe(self, info: WorkspaceInfo) -> WorkspaceInfo:
        """Return what the box said of itself together with what is known of it from outside."""
        return info if self._box is None else await self._box.completed(info)

    async def retire(self, seconds: float) -> None:
        """End the box that nobody uses; while a call runs in it, look again every so many seconds.

        A sandbox ends when its own time is over.
        """
        if self._idle is not None:
            return
        if self.is_running:
            await self._look(seconds)
        if self._let_go.done():
            await self.release()

    async def idle(self, *, ended_counts: bool = True) -> bool:
        """Whether there is nothing in the box that would be missed: it owes no result, has no shell and no process,
        not even one that has ended, unless that does not count."""
        if self._linked is None:  # there is none, or nothing has begun in it yet
            return not self.is_running or not self.survived
        if self.owing or self._frozen or (self._watch and not await self._watch.answers(self._patience)):
            return False
        try:
            info = await self._linked.peer.call(Describe(), timeout=self._patience)
            listed = await self._linked.peer.call(ProcessList(), timeout=self._patience)
        except AgentServerError:
            return False
        return not (info.running or info.operations or (ended_counts and listed))

    async def pause(self) -> None:
        """Freeze the box, if one runs, until it is used again.

        Raises:
            IsolationUnavailable: it is of a kind that cannot.
        """
        async with self._freezing:
            if self.is_running and not self._frozen:
                await self.linked()
                if self._box is not None:
                    await self._box.freeze()
                    self._set_frozen(True)

    async def resume(self) -> None:
        """Let a frozen box go on. Cancelling does not stop that."""
        if self._frozen and self._box is not None:
            if self._thawing is None:
                self._thawing = asyncio.create_task(self._thaw(self._box))
                self._thawing.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(self._thawing)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Let nothing run in the box for the length of the block; who uses it meanwhile waits."""
        async with self._freezing:
            box = self._box if self._linked is not None and not self._frozen else None
            if box is None:  # at rest, or frozen already
                yield
                return
            self._held = True
            try:
                await box.freeze()
                try:
                    yield
                finally:
                    await asyncio.shield(asyncio.ensure_future(box.thaw()))
            finally:
                self._held = False

    async def release(self, *, keep: bool = False) -> None:
        """End the box with all that runs in it, or leave it to itself; the next use starts another one then."""
        if self._keeper is not None:
            if not self._let_go.done():
                self._let_go.set_result(keep)
            await asyncio.wait([self._keeper])

    async def close(self, *, keep: bool = False) -> None:
        """Like `release`; the way cannot be used any more."""
        self._closed = True
        await cancel_and_wait(self._looking)
        await self.release(keep=keep)

    # --- its time ---

    def use(self) -> None:
        """Note that the box is being used, or was until now."""
        self._uses += 1
        self._used_at = asyncio.get_running_loop().time()
        if self._unused is not None and self._idle is None:
            self._unused.cancel()

    def _rest(self, seconds: float) -> None:
        def look() -> None:
            left = self._used_at + (self._idle or 0.0) - asyncio.get_running_loop().time()
            if self._idle is not None and left > 0:
                self._rest(left)
            else:
                self._looking = asyncio.create_task(self._look(seconds))

        if self._unused is not None:
            self._unused.cancel()
        self._unused = asyncio.get_running_loop().call_later(seconds, look)

    async def _look(self, seconds: float) -> None:
        """End the box if no call runs in it, and nobody comes back meanwhile."""
        uses = self._uses
        try:
            busy = bool(await self.operations())
        except AgentServerError:  # whoever uses it next finds out what it has
            busy = True
        if not self.is_running:
            return
        if busy or (uses != self._uses and self._idle is not None):
            self._rest(max(self._idle or seconds, LOOK_SECONDS))
        elif uses == self._uses:
            self._let_go.set_result(False)

    # --- one box, from its start to its end ---

    def _begin(self, box: Box | None) -> None:
        if self._closed:
            raise WorkspaceUnavailable("the workspace is closed", phase="closed")
        if box is None:
            self._admit()
        self._let_go = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(box))

    async def _keep(self, found: Box | None) -> None:
        error: AgentServerError | None = None
        change: Change = "ended"
        words, box = "", found
        try:
            box = self._box = found or self._make(self.instance)
            box.follow(self._set_frozen)
            try:
                change = await self._until_let_go(box, found is not None)
            except Exception as exc:  # noqa: BLE001  whoever waits for the box gets it, whatever it is
                lost = self._linked is not None or found is not None or isinstance(exc, WorkspaceLost)
                change, error = ("lost", None) if lost else ("ended", _failed(exc))
            if change == "lost":
                if not box.ended.done():  # its connection may break before its end is known
                    await asyncio.wait([box.ended], timeout=self._patience)
                words = box.last_words()
            if change == "left":
                box.let_go()
            else:
                await box.end()
        except Exception as exc:  # noqa: BLE001  as above; and nobody must wait for a box that nobody keeps
            error = error or _failed(exc)
            words = words or str(error)
        finally:
            began = self._linked is not None or found is not None
            cause = box.cause if box is not None else ""
            if self._unused is not None:
                self._unused.cancel()
            self._linked, self._keeper, self._box, self._frozen = None, None, None, False
            if self.awaited and self._closed and not self.owing:
                self._name.promise()
            if not (self.survived and isinstance(error, EngineUnavailable)):  # else it may still be there
                self._name.renew()
                self.survived = self.owing = False
            self._turn(error)
        self._tell(change, words)
        if change == "lost":
            self.events.publish(WorkspaceChanged(state="lost", reason=words, cause=cause))
        elif began and change == "ended":
            self.events.publish(
                WorkspaceChanged(state="stopped", reason="nobody used it; its files stay", cause="idle")
            )

    async def _until_let_go(self, box: Box, found: bool) -> Change:
        """Start it, unless it was found, and stay connected until it is let go of or has ended by itself.

        Let go of while it starts, nothing is left of it.
        """
        living = asyncio.create_task(self._live(box, found))
        reasons: list[asyncio.Future[Any]] = [living, self._let_go]
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        if not living.done():
            living.cancel()
            await asyncio.wait([living])
        if not self._let_go.done():
            return living.result()
        if not living.cancelled():
            living.exception()
        return "left" if self._let_go.result() and (found or self._linked is not None) else "ended"

    async def _live(self, box: Box, found: bool) -> Change:
        if not found:
            with told_if_long(self.events.tell):
                await box.start()
        await self._stay(box, "found" if found else "started")
        return "lost"

    async def _stay(self, box: Box, begins: Change) -> None:
        """Stay connected until the box has ended by itself."""
        barren = 0
        while not box.ended.done():
            async with AsyncExitStack() as stack:
                peer = await self._connect(stack, box)
                watch = BoxWatch(peer, self._patience, lambda: self._frozen or self._held)
                peer.calls.watch = self._watch = await stack.enter_async_context(watch)
                peer.calls.leave = is_left
                if first := self._linked is None:
                    self._name.redeem()
                self._linked = Linked(peer, box.instance)
                if first and self._idle is not None:
                    self._rest(self._idle)
                self._turn()
                if first:
                    self._tell(begins, "")
                    if begins == "started":
                        self.events.publish(WorkspaceChanged(state="ready"))
                closed: asyncio.Future[Any] = asyncio.ensure_future(peer.wait_closed())
                try:
                    await asyncio.wait((closed, box.ended), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await cancel_and_wait(closed)
            if (barren := 0 if peer.progress else barren + 1) == BARREN_CONNECTIONS:
                box.kill()

    async def _connect(self, stack: AsyncExitStack, box: Box) -> Peer:
        """Connect; a box that does not answer is killed, because nothing can be had from it any more."""
        hanging = asyncio.get_running_loop().call_later(self._patience, box.kill)
        try:
            reached = connect(box.url, box.token, on_notice=self.events.heed)
            return (await stack.enter_async_context(reached)).peer
        finally:
            hanging.cancel()

    def _turn(self, error: AgentServerError | None = None) -> None:
        """Let all who wait look again."""
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        if error is None:
            news.set_result(None)
        else:
            news.set_exception(error)
            news.exception()  # those who waited may be gone

    def _set_frozen(self, frozen: bool) -> None:
        """It was frozen or woken up: by us, or by somebody who uses the engine, too."""
        if frozen == self._frozen:
            return
        self._frozen = frozen
        self._tell("paused" if frozen else "resumed", "")
        state: Literal["paused", "ready"] = "paused" if frozen else "ready"
        self.events.publish(WorkspaceChanged(state=state, cause="" if frozen else "resumed"))

    async def _thaw(self, box: Box) -> None:
        try:
            await box.thaw()
            self._set_frozen(False)
        except AgentServerError:
            # One that has ended cannot be woken; whoever wanted to finds that out, as soon as it is known.
            await asyncio.wait([box.ended], timeout=self._patience)
            if not box.ended.done():
                raise
        finally:
            self._thawing = None


def _failed(exc: Exception) -> AgentServerError:
    """What those hear who wait for the box; the next call starts another one."""
    if isinstance(exc, AgentServerError):
        return exc
    why = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return WorkspaceUnavailable(f"the box could not be kept or ended: {why}; call again", phase="end")
