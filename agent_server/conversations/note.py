"""What a server notes about a conversation beside its log: read once at its start, then kept in memory for all."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from agent_sdk.log.database import ConversationRow
from agent_sdk.protocol.results import Snapshot, Wait
from agent_sdk.protocol.specs import Sandbox


class Note(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a server notes about a conversation beside its log."""

    owner: str
    """The conversation whose workspace it uses; its own id, or that of the one it shares with."""
    working_dir: str | None = None
    """An existing folder instead of one in the data folder."""
    sandbox: Sandbox | None = None
    """What its workspace is, if that is a container."""
    title: str | None = None
    tags: dict[str, str] = {}
    model: str | None = None

    @property
    def workspace(self) -> str:
        """What tells its workspace from others, as Snapshot.workspace has it."""
        return self.working_dir or self.owner


def note_of(row: ConversationRow) -> Note:
    """Return the note in a row; a fresh one where it cannot be read."""
    try:
        return msgspec.convert(row.meta, Note)
    except msgspec.ValidationError:
        return Note(owner=row.id)


def snapshot_of(row: ConversationRow, note: Note, missing: str) -> Snapshot:
    """Return what is known of a conversation that is not in memory; `missing`: of its agent, a sentence."""
    return Snapshot(
        id=row.id,
        state="damaged" if row.damaged else "running" if row.open_turn else "idle",
        epoch=row.epoch,
        head_seq=row.head_seq,
        title=note.title,
        tags=note.tags,
        created_at=row.created_at,
        updated_at=row.updated_at,
        model=note.model,
        workspace=note.workspace,
        waiting_for=missing,
        waits=(Wait(what="key", reason=missing),) if missing else (),
    )
