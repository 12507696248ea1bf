"""The conversations of a server: made, opened from the log, listed, let go of, deleted; and their workspaces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec.structs import replace

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.conversation.store import AgentStore
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConversationDamaged,
    ConversationNotFound,
    IsolationUnavailable,
    OpMismatch,
    draining,
)
from agent_sdk.protocol.methods.conversation import ListConversations
from agent_sdk.protocol.methods.workspace import SnapshotTaken
from agent_sdk.protocol.results import Snapshot, State
from agent_sdk.protocol.specs import WorkspaceSpec
from agent_sdk.rpc.peer import Peer
from agent_server.boxes.link import BoxLink
from agent_server.boxes.registry import Boxes
from agent_server.config.options import ServerConfig
from agent_server.conversations.loaded import BACK_SECONDS, CLOSE_GONE, LoadedConversation
from agent_server.conversations.retention import Retention
from agent_server.conversations.workspace import SHOWN_ID, Note, check_most, note_of, snapshot_of, wanted_note
from agent_server.data_folder import DataFolder
from agent_server.logs import Logs
from agent_server.metrics import Metrics
from agent_server.work import Work

RESUMED_AT_ONCE = 8


class Conversations:
    """The conversations of a server. Entering lets turns go on that the last server left; leaving ends all boxes."""

    def __init__(
        self,
        config: ServerConfig,
        folder: DataFolder,
        log: EventLog,
        logs: Logs,
        metrics: Metrics,
        work: Work,
        store: AgentStore,
    ) -> None:
        self._config = config
        self._folder = folder
        self._log = log
        self._logs = logs
        self._metrics = metrics
        self._work = work
        self._store = store
        self._notes: dict[str, Note] = {}
        """By id, the oldest first."""
        self._left: dict[str, State] = {}
        """The states of those that the last server did not leave idle, until they are in memory."""
        self._awaited: dict[str, int] = {}
        """How many clients of each the last server let go of, for as long as they are waited for."""
        self._loaded: dict[str, LoadedConversation] = {}
        self._boxes = Boxes(config, folder, logs, self._count_boxes)
        self._stopping = False
        self._winding_down = False
        self._retention = Retention(self, log, logs, config.retention_seconds)
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._letting_go: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.Task[None] | None = None
        self._abandoned: list[str] = []
        """Whose turns the last server left, and nobody has looked at yet."""

    def __repr__(self) -> str:
        return f"<Conversations: {len(self._notes)}, {len(self._loaded)} in memory>"

    async def __aenter__(self) -> Self:
        rows = await self._log.list()
        for row in reversed(rows):
            self._notes[row.id] = note_of(row)
            if row.damaged or row.open_turn is not None:
                self._left[row.id] = "damaged" if row.damaged else "running"
        await self._boxes.__aenter__()
        await self._finish_removals()
        for row in rows:
            if row.damaged:
                self._logs.log.warning(
                    "conversation_damaged", conversation=row.id, advice="it can only be deleted"
                )
        self._awaited.update(await asyncio.to_thread(self._folder.take_clients))
        asyncio.get_running_loop().call_later(BACK_SECONDS, self._awaited.clear)
        self._abandoned = [row.id for row in rows if row.open_turn is not None and not row.damaged]
        self._resuming = asyncio.create_task(self._resume())
        self._retention.begin()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of everything, leave turns and boxes to the next server; may be called again."""
        self._stopping = True
        await self._retention.end()
        await cancel_and_wait(self._resuming)
        for timer in self._timers.values():
            timer.cancel()
        for id in list(self._loaded):
            self._begin_close(id)
        if self._closing:
            await asyncio.wait(self._closing.values())
        await self._note_debts()
        await self._boxes.close()

    async def _note_debts(self) -> None:
        """Find the boxes that know what became of a call, while the log does not: they must not be ended."""
        for id, note in self._notes.items():
            link = self._boxes.link_of(note.owner)
            if link is not None and link.is_running and not link.untouched:
                with suppress(AgentServerError):
                    begun = await self._log.operations(id).begun()
                    owing = id in self._abandoned or any(op.instance == link.instance for op in begun)
                    link.owing = link.owing or owing

    def __contains__(self, id: str) -> bool:
        return id in self._notes

    async def create(self, spec: WorkspaceSpec | None = None, id: str | None = None) -> str:
        """Make a conversation and return its id. Its box starts when it is needed.

        Args:
            id: chosen by the client; when it was made already, nothing happens.

        Raises:
            ConversationNotFound: there is none of the id whose workspace is to be shared.
            OpMismatch: the id belongs to a conversation with another workspace.
            PathNotFound, NotADirectory: `working_dir` is no folder.
            InvalidParams: the spec contradicts itself or makes no sense.
            PolicyDenied, ImageUnavailable, IsolationUnavailable: this server does not allow such a sandbox, or
                cannot make one.
            EngineUnavailable: it has no container engine now.
        """
        id = id or new_id()
        note = wanted_note(id, spec or WorkspaceSpec(), self._notes, self._config, self._folder)
        if id not in self._notes:
            if note.sandbox is not None:
                backend = await self._boxes.sandboxes.admit(note.sandbox)
                check_most(note.sandbox, self._config, cpus=backend.cpus, memory=backend.memory)
            elif note.owner == id and note.working_dir is None:
                await asyncio.to_thread(self._folder.confinement.give, self._folder.workspace(id))
            await self._log.create(id, msgspec.to_builtins(note))
            self._logs.log.info("conversation_made", conversation=id)
        made = self._notes.setdefault(id, note)
        if (made.owner, made.working_dir, made.sandbox) != (note.owner, note.working_dir, note.sandbox):
            raise OpMismatch(f"conversation {id} was made with another workspace", op_id=id)
        return id

    @asynccontextmanager
    async def using(self, id: str) -> AsyncIterator[LoadedConversation]:
        """Have a conversation in memory for the length of the block; `hold` says what this raises."""
        loaded = await self.hold(id)
        try:
            yield loaded
        finally:
            self.let_go(loaded)

    async def hold(self, id: str) -> LoadedConversation:
        """Have a conversation in memory until `let_go`; cancelling lets it go.

        Raises:
            ConversationNotFound: there is none of this id.
            Overloaded: the server is stopping, and has let go of all conversations.
        """
        loaded = await self._get(id)
        try:
            await loaded.open()
        except BaseException as exc:
            if isinstance(exc, ConversationDamaged):
                self._left[id] = "damaged"
            self.let_go(loaded)
            raise
        self._left.pop(id, None)
        return loaded

    def let_go(self, loaded: LoadedConversation, *, for_good: bool = False) -> None:
        """One user less; the last leaves it in memory for a while. `for_good`: that user does not come back."""
        loaded.users -= 1
        if not loaded.users and for_good and not self._stopping:
            self._retention.left(loaded.id, loaded.head_seq)
        if not loaded.users and self._loaded.get(loaded.id) is loaded:
            loop = asyncio.get_running_loop()
            delay = self._config.idle_seconds if loaded.id in self._notes else 0.0
            self._timers[loaded.id] = loop.call_later(delay, self._evict, loaded)

    async def snapshots(self, wanted: ListConversations) -> list[Snapshot]:
        """Return a page of conversations, newest first. Those that are not in memory have no stats.

        Of the log nothing is read but what is returned.
        """
        ids = list(reversed(self._notes))
        if wanted.before in self._notes:
            ids = ids[ids.index(wanted.before) + 1 :]
        elif wanted.before is not None:  # gone since; our own ids grow with time
            ids = [id for id in ids if id < wanted.before]
        ids = [id for id in ids if self._may_be(id, wanted)]
        found: list[Snapshot] = []
        while ids and (room := wanted.limit - len(found)):
            page, ids = ids[:room], ids[room:]
            found += [each for each in await self._read(page) if wanted.state in (None, each.state)]
        return found

    def _may_be(self, id: str, wanted: ListConversations) -> bool:
        if not wanted.tags.items() <= self._notes[id].tags.items():
            return False
        return wanted.state is None or id in self._loaded or self._left.get(id, "idle") == wanted.state

    async def _read(self, ids: list[str]) -> list[Snapshot]:
        rows = {row.id: row for row in await self._log.list(ids)}
        settings = await self._log.settings_of([id for id in ids if id not in self._loaded])
        found = []
        for id in ids:
            loaded = self._loaded.get(id)
            if loaded is not None and loaded.epoch:
                found.append(await loaded.state())
            elif id in rows and id in self._notes:
                missing = self._store.missing(id, *settings[id]) if id in settings else ""
                found.append(snapshot_of(rows[id], self._notes[id], missing))
        return found

    async def note(self, loaded: LoadedConversation) -> None:
        """Keep title, tags and model of a conversation where the list finds them."""
        state = await loaded.state()
        note = replace(self._notes[loaded.id], title=state.title, tags=state.tags, model=state.model)
        if note != self._notes[loaded.id]:
            self._notes[loaded.id] = note
            await self._log.set_meta(loaded.id, msgspec.to_builtins(note))

    async def delete(self, loaded: LoadedConversation, *, caller: Peer | None = None) -> None:
        """Remove a conversation with its log, and its workspace when nobody else uses that.

        Its connections are closed with 4404, but for the caller's, which still has to be answered.
        """
        note = self._notes.pop(loaded.id, None)
        await self._condemn(note)
        await loaded.local.delete()
        loaded.dismiss(CLOSE_GONE, "the conversation was deleted", but=caller)
        await self._remove_place(loaded.id, note)

    async def snapshot(self, loaded: LoadedConversation) -> SnapshotTaken:
        """Copy the files of its workspace; nothing in it runs meanwhile.

        Raises:
            IsolationUnavailable: it is no sandbox, or this server takes none.
        """
        note = self._notes[loaded.id]
        if note.sandbox is None:
            raise IsolationUnavailable("only the workspace of a sandbox can be copied", wanted="snapshot")
        async with loaded.link.still():
            return await self._boxes.sandboxes.snapshot(note.owner)

    def in_memory(self, id: str) -> bool:
        """Whether somebody uses it, or did a short while ago."""
        return id in self._loaded

    async def is_empty(self, id: str) -> bool:
        """Whether nothing would be missed: no file in its workspace, nothing that runs, and nobody who shares it."""
        note = self._notes.get(id)
        if note is None or note != Note(owner=note.owner, working_dir=note.working_dir, sandbox=note.sandbox):
            return False
        if any(other.owner == id for name, other in self._notes.items() if name != id):
            return False
        link = self._boxes.link_of(note.owner)
        # Commands that have ended may have changed a sandbox elsewhere than in its workspace.
        if (
            link is not None
            and note.owner == id
            and not await link.idle(ended_counts=note.sandbox is not None)
        ):
            return False
        if note.owner != id or note.working_dir is not None:
            return True
        if note.sandbox is not None:
            return not await asyncio.to_thread(self._boxes.sandboxes.has_files, id)
        return await asyncio.to_thread(self._folder.confinement.is_empty, self._folder.workspace(id))

    async def remove(self, id: str, *, unless_used: bool = False) -> None:
        """Remove a conversation that may be damaged, or that nobody uses; with `unless_used` only where that is so."""
        loaded = self._loaded.get(id)
        used = id in self._closing or (loaded is not None and (loaded.users or loaded.busy))
        if unless_used and used:
            return
        if loaded is not None and loaded.epoch:
            async with self.using(id):
                await self.delete(loaded)
            return
        note = self._notes.pop(id, None)
        await self._condemn(note)
        await self._log.delete(id)
        await self._remove_place(id, note)

    async def _remove_place(self, id: str, note: Note | None) -> None:
        self._logs.log.info("conversation_deleted", conversation=id)
        if note is not None and not self._is_used(note.owner):
            await self._remove(note.owner, sandbox=note.sandbox is not None)

    async def _remove(self, owner: str, *, sandbox: bool) -> None:
        """Remove a workspace with its box. One in a folder of the machine's stays, of course."""
        await self._boxes.forget(owner)
        if sandbox:
            await self._boxes.sandboxes.forget(owner)
        else:
            await asyncio.to_thread(self._folder.confinement.remove, self._folder.workspace(owner))
        await asyncio.to_thread((self._folder.condemned / owner).unlink, missing_ok=True)

    def _is_used(self, owner: str) -> bool:
        return any(note.owner == owner for note in self._notes.values())

    async def _condemn(self, note: Note | None) -> None:
        """Write down what is about to be removed: the log forgets it first, and we may be killed in between."""
        if note is not None and not self._is_used(note.owner):
            kind = "sandbox" if note.sandbox is not None else "folder"
            await asyncio.to_thread(_mark, self._folder.condemned / note.owner, kind)

    async def _finish_removals(self) -> None:
        """Remove what the last server was removing when it was killed; what the log still has it had not begun with."""
        for mark in await asyncio.to_thread(lambda: list(self._folder.condemned.glob("*"))):
            if self._is_used(mark.name):
                await asyncio.to_thread(mark.unlink)
            else:
                await self._remove(mark.name, sandbox=await asyncio.to_thread(mark.read_text) == "sandbox")

    async def note_clients(self) -> None:
        """Leave word to the next server of who is there and will come back."""
        clients = {id: loaded.subscribers for id, loaded in self._loaded.items() if loaded.subscribers}
        await asyncio.to_thread(self._folder.note_clients, clients)

    def wind_down(self) -> None:
        """Let go of every turn as soon as the next server can go on with it; it counts as work until then.

        None begins any more in a conversation that is opened from now on.
        """
        self._winding_down = True
        if self._resuming is not None:
            self._resuming.cancel()
        for loaded in self._loaded.values():
            self._wind_down(loaded)

    def _wind_down(self, loaded: LoadedConversation) -> None:
        task = asyncio.create_task(loaded.wind_down())
        self._letting_go.add(task)
        task.add_done_callback(self._letting_go.discard)

    def dismiss(self, code: int, reason: str) -> None:
        """Close all connections."""
        for loaded in self._loaded.values():
            loaded.dismiss(code, reason)

    async def _resume(self) -> None:
        """Open the conversations whose turns the last server left, a few at a time: opened, they go on."""

        async def worker() -> None:
            while self._abandoned:
                id = self._abandoned.pop()
                try:
                    async with self.using(id):
                        pass
                except AgentServerError as exc:  # its turn waits until somebody opens it
                    self._logs.log.warning("turn_not_resumed", conversation=id, problem=str(exc))

        await asyncio.gather(*(worker() for _ in range(RESUMED_AT_ONCE)))

    # --- in memory ---

    async def _get(self, id: str) -> LoadedConversation:
        while id in self._closing:
            await asyncio.wait([self._closing[id]])
        if self._stopping:
            raise draining()
        note = self._notes.get(id)
        if note is None:
            raise ConversationNotFound(f"no conversation {id[:SHOWN_ID]!r}", conversation=id[:SHOWN_ID])
        timer = self._timers.pop(id, None)
        if timer is not None:
            timer.cancel()
        loaded = self._loaded.get(id)
        if loaded is None:
            loaded = LoadedConversation(
                id,
                self._log,
                self._link(note),
                workspace=note.workspace,
                logs=self._logs,
                metrics=self._metrics,
                work=self._work,
                store=self._store,
                awaited=self._awaited.pop(id, 0),
            )
            if self._winding_down:
                self._wind_down(loaded)  # takes its first step before it can be open
            self._loaded[id] = loaded
            self._metrics.conversations.set(len(self._loaded))
        loaded.users += 1
        return loaded

    def _evict(self, loaded: LoadedConversation) -> None:
        """Let an idle conversation go; one that is busy is looked at again later."""
        if loaded.busy:
            loaded.users += 1
            self.let_go(loaded)
        else:
            self._begin_close(loaded.id)

    def _begin_close(self, id: str) -> None:
        self._timers.pop(id, None)
        if id not in self._closing:
            self._closing[id] = asyncio.create_task(self._close(id))

    async def _close(self, id: str) -> None:
        loaded = self._loaded[id]
        try:
            await loaded.close()
            others = (other for other in self._loaded.values() if other is not loaded)
            if not self._stopping and not any(other.link is loaded.link for other in others):
                await loaded.link.retire(self._config.idle_seconds)
        finally:
            del self._loaded[id]
            del self._closing[id]
            self._metrics.conversations.set(len(self._loaded))

    # --- workspaces ---

    def _link(self, note: Note) -> BoxLink:
        if note.sandbox is not None:
            return self._boxes.sandbox(note.owner, note.sandbox)
        return self._boxes.link(note.owner, Path(note.working_dir) if note.working_dir else None)

    def _count_boxes(self) -> None:
        self._metrics.boxes.set(self._boxes.running)


def _mark(file: Path, kind: str) -> None:
    """Write it whole or not at all: on a full disk deleting must go on, it is what makes room."""
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.write_text(kind)
    except OSError:
        file.unlink(missing_ok=True)
