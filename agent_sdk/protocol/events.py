"""What happened in a conversation: a tagged union of facts, in the order of `seq`.

An event with a `seq` is in the log. What is not in the log did not happen. Tags are literal, so
that renaming a class cannot change the wire. A kind this version does not know is kept whole as
`Unknown`: old clients survive new servers, and a log written by a newer version loses nothing.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec
from msgspec import Raw, Struct

from agent_sdk.protocol.errors import InvalidRequest
from agent_sdk.protocol.specs import ConfirmationPolicy, ToolSpec

RunStatus = Literal["finished", "paused", "interrupted", "failed", "limit"]
"""How a turn ended. `finished`: the agent is done; `limit`: max_iterations, or the model's output
limit cut its answers; `failed`: see `error`."""


class Base(Struct, frozen=True, kw_only=True, tag_field="type"):
    """What every event carries."""

    seq: int = 0
    """Position in the conversation's log, from 1, without gaps; 0 while not yet in a log."""
    at: float = 0.0
    """Seconds since the Unix epoch by the writer's clock; for people, never for order."""

    def to_json(self) -> str:
        """Return the event as JSON, as it is in the log; an Unknown exactly as it came."""
        return bytes(encode(self)).decode()  # type: ignore[arg-type]


class ConversationCreated(Base, frozen=True, tag="conversation_created"):
    """The first event of every log."""

    conversation: str
    version: int = 1


class AgentConfigured(Base, frozen=True, tag="agent_configured"):
    """From here on this agent answers. Keys are left out."""

    model: str
    tools: tuple[str, ...]
    client_tools: tuple[ToolSpec, ...] = ()
    instructions: str = ""
    max_iterations: int = 500
    confirmation: ConfirmationPolicy = ConfirmationPolicy()


class UserMessage(Base, frozen=True, tag="user_message"):
    """A message to the agent."""

    text: str
    op_id: str | None = None


class TurnStarted(Base, frozen=True, tag="turn_started"):
    """The agent begins to work. TurnEnded with the same run_id follows."""

    run_id: str


class TurnResumed(Base, frozen=True, tag="turn_resumed"):
    """Another process goes on with the turn, because the one that ran it ended."""

    run_id: str
    generation: int
    """How many processes have run this turn, this one included: 2, 3, …"""


class AgentMessage(Base, frozen=True, tag="agent_message"):
    """One answer of the model. The tools it called follow as ToolCalled."""

    run_id: str
    text: str
    thinking: str = ""
    tool_calls: int = 0
    """How many ToolCalled events follow."""
    seen_seq: int = 0
    """The log's last seq when the model was asked: a UserMessage after it was not read yet."""
    provider: Any = None
    """What the provider wants to see again unchanged in later requests (signed thinking); opaque.
    A Raw or None: msgspec cannot decode the union of the two."""
    finish_reason: str = ""
    """Why it ended: `stop`, `tool_calls`, `length` (cut by the output limit), `context_window` (cut because that is
    full), `refused` (by the model), `filtered` (by the provider), `interrupted` (broken off with the turn: this is what
    had come), or the provider's own word; empty in logs of older versions."""

    def __post_init__(self) -> None:
        if self.provider is not None and not isinstance(self.provider, Raw):
            msgspec.structs.force_setattr(self, "provider", Raw(_encoder.encode(self.provider)))


class ToolCalled(Base, frozen=True, tag="tool_called"):
    """The model asked for a tool. Exactly one ToolReturned with this call_id follows."""

    run_id: str
    call_id: str
    tool: str
    arguments: str
    """The arguments exactly as the model wrote them: JSON text, possibly malformed."""
    place: str = ""
    """The box that lived when this was written: what began in it is not begun again in another one."""
    cut: bool = False
    """The output limit cut the arguments: the call is not run, and the model is told."""


class ToolReturned(Base, frozen=True, tag="tool_returned"):
    """What came of a tool call."""

    call_id: str
    tool: str
    text: str
    is_error: bool = False
    data: dict[str, Any] = {}
    """Facts for programs, e.g. exit_code."""
    bytes_cut: int = 0
    """UTF-8 bytes of the result that were left out of `text`, in its middle; 0: `text` is whole."""


class ModelUsed(Base, frozen=True, tag="model_used"):
    """What one model call consumed."""

    run_id: str
    model: str
    input_tokens: int = 0
    """All input tokens, cached ones included."""
    output_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None
    """US dollars; None: the price is not known."""
    seconds: float = 0.0


class ModelFailed(Base, frozen=True, tag="model_failed"):
    """A model call failed. With `retry_in` it is tried again, without the turn ends."""

    run_id: str
    error: str
    """The kind of the error, e.g. `model_rate_limited`."""
    message: str
    attempt: int
    retry_in: float | None = None
    """Seconds until the next try."""


class RequestOpened(Base, frozen=True, tag="request_opened"):
    """A request that has to be answered before the agent can go on."""

    request_id: str
    call_id: str
    request: Literal["approval", "client_tool"]
    tool: str
    arguments: str


class RequestResolved(Base, frozen=True, tag="request_resolved"):
    """A request was answered, or is void because the turn ended."""

    request_id: str
    answer: Literal["approved", "rejected", "answered", "void"]
    reason: str = ""


class Waiting(Base, frozen=True, tag="waiting"):
    """The turn cannot go on before somebody does something. Requests have an event of their own, `request_opened`."""

    what: Literal["key", "box"]
    reason: str = ""
    """What is missing and what to do about it, in one sentence; empty: the turn goes on."""


class PauseRequested(Base, frozen=True, tag="pause_requested"):
    """The turn will stop before its next step."""


class Interrupted(Base, frozen=True, tag="interrupted"):
    """The turn was stopped at once; calls under way were cancelled."""

    reason: str = ""


class TurnEnded(Base, frozen=True, tag="turn_ended"):
    """The agent stopped working."""

    run_id: str
    status: RunStatus
    final_text: str = ""
    reason: str = ""
    error: str | None = None
    """With status `failed`: the kind of the error, as in `data.kind` on the wire."""
    retryable: bool = False
    iterations: int = 0
    finish_reason: str = ""
    """Of the model's last answer, as in `agent_message`; empty: there was none."""


class ErrorRaised(Base, frozen=True, tag="error_raised"):
    """Something went wrong that is not a tool's result."""

    error: str
    """The kind of the error."""
    message: str
    classification: Literal["model", "tool", "workspace", "policy", "limit", "internal"]
    retryable: bool = False


class TitleChanged(Base, frozen=True, tag="title_changed"):
    """The conversation has a new title or new tags."""

    title: str | None = None
    tags: dict[str, str] = {}


class SecretsChanged(Base, frozen=True, tag="secrets_changed"):
    """Secrets with these names were set; the values are never in the log."""

    names: tuple[str, ...]


class WorkspaceChanged(Base, frozen=True, tag="workspace_changed"):
    """The place where commands run started, stopped, was lost, or something in it ran into a limit."""

    state: Literal["ready", "paused", "stopped", "lost", "limited"]
    reason: str = ""
    """One sentence."""
    cause: str = ""
    """In one word. Of `limited`: `memory`, `pids`, `disk`; of `lost`: `oom`, `killed`, `exit`, `engine`, …;
    of `stopped`: `idle`."""


class LogRecovered(Base, frozen=True, tag="log_recovered"):
    """The end of the log was damaged and has been cut off; the log has a new epoch."""

    reason: str
    after_seq: int
    """The last event that was whole."""


class Unknown(Base, frozen=True, tag="unknown"):
    """An event of a kind this version does not know: kept whole, never dropped."""

    kind: str
    raw: Raw


KnownEvent = (
    ConversationCreated
    | AgentConfigured
    | UserMessage
    | TurnStarted
    | TurnResumed
    | AgentMessage
    | ToolCalled
    | ToolReturned
    | ModelUsed
    | ModelFailed
    | RequestOpened
    | RequestResolved
    | Waiting
    | PauseRequested
    | Interrupted
    | TurnEnded
    | ErrorRaised
    | TitleChanged
    | SecretsChanged
    | WorkspaceChanged
    | LogRecovered
)
Event = KnownEvent | Unknown


class Delta(Struct, frozen=True, kw_only=True):
    """A transient piece of an answer that is being written. It has no seq and may be lost."""

    run_id: str
    after_seq: int
    """The log's last seq when the piece came."""
    text: str = ""
    thinking: str = ""


class _Head(Struct):
    type: str
    seq: int
    at: float = 0.0


_KINDS: frozenset[str] = frozenset(str(cls.__struct_config__.tag) for cls in get_args(KnownEvent))
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[KnownEvent] = msgspec.json.Decoder(KnownEvent)
_head = msgspec.json.Decoder(_Head)


def kinds() -> dict[str, type[Base]]:
    """Tag to class, for documents and filters."""
    return {str(cls.__struct_config__.tag): cls for cls in get_args(KnownEvent)}


def kind_of(event: Event) -> str:
    """The event's tag on the wire."""
    return event.kind if isinstance(event, Unknown) else str(event.__struct_config__.tag)


def encode(event: Event) -> bytes:
    """The event as JSON; an Unknown exactly as it came."""
    return bytes(event.raw) if isinstance(event, Unknown) else _encoder.encode(event)


def decode(raw: bytes | Raw | memoryview) -> Event:
    """The event in this JSON.

    Raises:
        InvalidRequest: no event, or a known kind with wrong fields.
    """
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        reason = str(exc)
    try:
        head = _head.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(f"not an event: {reason}") from None
    if head.type in _KINDS:
        raise InvalidRequest(f"malformed {head.type} event: {reason}")
    return Unknown(seq=head.seq, at=head.at, kind=head.type, raw=Raw(bytes(raw)))
