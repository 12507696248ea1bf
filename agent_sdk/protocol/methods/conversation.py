"""Methods of a conversation, and what its server asks of a client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

from agent_sdk.protocol.checks import Comment, Iterations, Reason, Tags, Title
from agent_sdk.protocol.methods.method import Done, Effect, Method, Name, Offset, OpId
from agent_sdk.protocol.results import Accepted, Snapshot, State
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, Model


class Configure(Effect[Done], frozen=True, kw_only=True):
    """Say which agent answers from here on."""

    method = "conversation.configure"
    agent: AgentSpec
    max_iterations: Iterations = 500
    confirmation: ConfirmationPolicy = ConfirmationPolicy()
    title: Title | None = None
    tags: Tags = {}
    secrets: dict[str, str] = {}


class RegisterTools(Method[Done], frozen=True, kw_only=True):
    """Let this connection answer the calls of these client tools; pending ones are delivered to it."""

    method = "tools.register"
    tools: list[str]


class SendMessage(Effect[Accepted], frozen=True, kw_only=True):
    """Append a user message; an idle agent starts to work."""

    method = "send_message"
    text: str
    mode: Literal["enqueue", "interrupt"] = "enqueue"
    turn: str | None = None
    """The run_id of the turn that it is to interrupt, and no later one; null: whichever runs."""


class RunAnswer(Struct, frozen=True, kw_only=True):
    """The turn that runs, or the last one."""

    run_id: str
    running: bool
    ended_seq: int = 0
    """The seq of its TurnEnded; 0 while it runs."""


class Run(Effect[RunAnswer], frozen=True, kw_only=True):
    """Make a paused, failed or limited turn go on; answers at once. The end is the event turn_ended."""

    method = "run"
    turn: str | None = None
    """The run_id of a turn whose end the caller has not heard: a failure is told before the turn is tried again."""


class Pause(Effect[Done], frozen=True, kw_only=True):
    """Stop the turn before its next step."""

    method = "pause"
    turn: str | None = None
    """The run_id of the turn that is meant, and no later one; null: whichever runs."""


class Interrupt(Effect[Done], frozen=True, kw_only=True):
    """Stop the turn now; answers when it has ended."""

    method = "interrupt"
    turn: str | None = None
    """The run_id of the turn that is meant, and no later one; null: whichever runs."""
    reason: Reason = ""


class Respond(Effect[Done], frozen=True, kw_only=True):
    """Answer an approval."""

    method = "respond"
    request_id: Name
    answer: Literal["approve", "reject"]
    reason: Comment = ""


class GetState(Method[Snapshot], frozen=True, kw_only=True):
    """The conversation at this moment."""

    method = "conversation.state"


PAGE_EVENTS = 1000
"""Events in one answer."""


class EventPage(Struct, frozen=True, kw_only=True):
    """Some events in order."""

    epoch: str
    events: list[Raw]
    head_seq: int


class GetEvents(Method[EventPage], frozen=True, kw_only=True):
    """The events after a seq, a page at a time: at most `limit`, and at most 512 KiB unless one alone is longer."""

    method = "conversation.events"
    after: Offset = 0
    limit: Annotated[int, Meta(ge=1, le=PAGE_EVENTS)] = PAGE_EVENTS


class Subscribed(Struct, frozen=True, kw_only=True):
    """Events follow."""

    epoch: str
    head_seq: int
    state: Snapshot | None = None
    """As in `initialize`."""


class Subscribe(Method[Subscribed], frozen=True, kw_only=True):
    """Send the events after `after_seq`, then live ones; like `resume` in `initialize`, once per connection."""

    method = "events.subscribe"
    epoch: str | None = None
    after_seq: Offset = 0


class UpdateSecrets(Effect[Done], frozen=True, kw_only=True):
    """Set secrets by name."""

    method = "update_secrets"
    secrets: dict[str, str]


class SetConfirmationPolicy(Effect[Done], frozen=True, kw_only=True):
    """Decide which tool calls wait for approval."""

    method = "set_confirmation_policy"
    policy: ConfirmationPolicy


class SwitchLlm(Effect[Done], frozen=True, kw_only=True):
    """Use another model from the next model call on."""

    method = "switch_llm"
    llm: Model


class SetTitle(Effect[Done], frozen=True, kw_only=True):
    """Name the conversation; tags are merged."""

    method = "set_title"
    title: Annotated[str, Meta(max_length=1024)] | None = None
    tags: Annotated[dict[str, str], Meta(max_length=64)] | None = None


class Delete(Effect[Done], frozen=True, kw_only=True):
    """Remove the conversation, its log and its workspace folder (not a `working_dir`)."""

    method = "conversation.delete"
    unless_busy: bool = False
    """Refuse while a turn runs, or waits for an answer."""


class ListConversations(Method[list[Snapshot]], frozen=True, kw_only=True):
    """The conversations of the server, newest first, a page at a time."""

    method = "conversations.list"
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    before: OpId | None = None
    """Only those made before this one: the last id of the page before, which may have been deleted since."""
    tags: Annotated[dict[str, str], Meta(max_length=64)] = {}
    """Only those that have all of these."""
    state: State | None = None
    """Only those in this state."""


class ToolOutput(Struct, frozen=True, kw_only=True):
    """What a client tool returned."""

    text: str
    is_error: bool = False
    data: dict[str, Any] = {}


class ToolCall(Method[ToolOutput], frozen=True, kw_only=True):
    """Run a client tool. The call is a durable request: it is delivered again until it is answered."""

    method = "tool.call"
    request_id: str
    call_id: str
    tool: str
    arguments: str


CONVERSATION: tuple[type[Method[Any]], ...] = (
    Configure,
    RegisterTools,
    SendMessage,
    Run,
    Pause,
    Interrupt,
    Respond,
    GetState,
    GetEvents,
    Subscribe,
    UpdateSecrets,
    SetConfirmationPolicy,
    SwitchLlm,
    SetTitle,
    Delete,
    ListConversations,
)
"""Answered by a server."""
CLIENT: tuple[type[Method[Any]], ...] = (ToolCall,)
"""Answered by a client: the server calls them over the same connection."""
