"""Methods and notices of the connection itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

from agent_sdk.protocol.methods.method import Method, Notice, Offset, OpId
from agent_sdk.protocol.results import Snapshot
from agent_sdk.protocol.specs import Limits, WorkspaceSpec


class ClientInfo(Struct, frozen=True, kw_only=True):
    """Who speaks."""

    name: str
    version: str


class Resume(Struct, frozen=True, kw_only=True):
    """Where the client stopped reading."""

    epoch: str | None = None
    """None: any."""
    after_seq: Offset = 0


class Initialized(Struct, frozen=True, kw_only=True):
    """The answer to `initialize`."""

    protocol_version: int
    server: ClientInfo
    limits: Limits
    connection_id: str
    heartbeat_s: float
    conversation: str | None = None
    epoch: str | None = None
    head_seq: int = 0
    state: Snapshot | None = None
    """What a client that comes back has to know at once: the turn, pending requests, running operations."""
    capabilities: dict[str, Any] = {}


class Initialize(Method[Initialized], frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The first message of every connection, within 10 s. After its answer come the events after `resume.after_seq`.

    Fields that a server does not know do not count: it may be older than its client, and says its version.
    """

    method = "initialize"
    protocol_version: int
    client: ClientInfo
    capabilities: dict[str, Any] = {}
    limits: Limits = Limits()
    auth: str | None = None
    """The API key, where the upgrade request could not carry it."""
    resume: Resume | None = None
    """None: no events are sent."""
    workspace: WorkspaceSpec | None = None
    """For a new conversation only."""
    conversation: OpId | None = None
    """The id a new conversation gets; repeated, it leads to the one that was made. None: the server chooses."""


class Pong(Struct, frozen=True):
    """Alive."""


class Ping(Method[Pong], frozen=True, kw_only=True):
    """Answer at once."""

    method = "ping"


class CancelOutcome(Struct, frozen=True):
    """What became of the cancelled call; the call itself ends with -32800 when it was cancelled."""

    outcome: Literal["cancelled", "already_done", "not_cancellable"]


class CancelCall(Method[CancelOutcome], frozen=True, kw_only=True):
    """Cancel a call of this connection by its JSON-RPC id. `$/cancelRequest` is its notification form."""

    method = "call.cancel"
    id: int | str
    reason: Annotated[str, Meta(max_length=1024)] = ""


class CancelNotice(Notice, frozen=True, kw_only=True):
    """The Language Server Protocol's way to cancel."""

    method = "$/cancelRequest"
    id: int | str


class EventsNotice(Notice, frozen=True, kw_only=True):
    """Durable events in the order of `seq`, without gaps."""

    method = "events"
    epoch: str
    events: list[Raw]


class SyncReset(Notice, frozen=True, kw_only=True):
    """The history the client asked for is gone: what it knows is void, the events that follow start anew."""

    method = "sync.reset"
    reason: str
    epoch: str
    from_seq: int


class DeltaNotice(Notice, frozen=True, kw_only=True):
    """A transient piece of an answer; it has no `seq` and may be left out."""

    method = "delta"
    delta: Raw


class Draining(Notice, frozen=True, kw_only=True):
    """The server is about to stop; the connection closes with 4503."""

    method = "draining"
    retry_after_ms: int = 1000


CONNECTION: tuple[type[Method[Any]], ...] = (Initialize, Ping, CancelCall)
"""Answered by both ends, `initialize` by the accepting one."""
NOTICES: tuple[type[Notice], ...] = (EventsNotice, DeltaNotice, SyncReset, Draining, CancelNotice)
