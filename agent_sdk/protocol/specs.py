"""Plain data that describes things: models, agents, sandboxes. Nothing here acts or knows a clock."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from agent_sdk.protocol.checks import (
    ApiKey,
    Checked,
    Folder,
    Gpus,
    Header,
    HeaderName,
    Label,
    Limit,
    Mount,
    Name,
    OsText,
    Platform,
    ToolName,
    User,
    Variable,
)
from agent_sdk.protocol.errors import InvalidParams

PROTOCOL_VERSION = 1
SUBPROTOCOL = "agentrpc.v1"

Json = dict[str, Any]

_SIZE = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?[bkmgt]?(i?b)?")


class LLM(Checked, frozen=True, kw_only=True, tag_field="kind", tag="llm", forbid_unknown_fields=True):
    """A model and how to reach it."""

    model: Annotated[str, Meta(min_length=1)]
    """`provider/name`, e.g. `openai/gpt-5.5`, `anthropic/claude-sonnet-5`; the provider picks the wire format."""
    api_key: ApiKey | None = None
    """Sent to the provider only; never stored in the log, never shown by `repr`."""
    base_url: str | None = None
    """Replaces the provider's address, up to and including the version (`http://host/v1`)."""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    reasoning_effort: str | None = None
    stream: bool = True
    timeout: Limit = 300.0
    """Seconds without a byte from the provider until the call counts as failed."""
    retries: Annotated[int, Meta(ge=0, le=20)] = 5
    """Further tries after a retryable failure."""
    headers: dict[HeaderName, Header] = {}
    input_cost: Annotated[float, Meta(ge=0)] | None = None
    """US dollars per million input tokens; None: unknown, cost is then not counted."""
    output_cost: Annotated[float, Meta(ge=0)] | None = None
    cached_input_cost: Annotated[float, Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # msgspec makes the class anew, so a bare super() would not find it
        if self.base_url is not None:
            _check_address(self.base_url)

    def __repr__(self) -> str:
        return f"LLM(model={self.model!r}, base_url={self.base_url!r})"


def _check_address(base_url: str) -> None:
    try:
        parts = urlsplit(base_url.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        fits = False
    if not fits:
        raise InvalidParams("base_url is no address: it looks like https://host/v1", field="base_url")
    if parts.username is not None or parts.password is not None:
        raise InvalidParams(
            "base_url: it has a user name or password in it, which others could read; leave them out and send them as "
            "headers={'Authorization': 'Basic …'}",
            field="base_url",
        )


class Say(Checked, frozen=True, tag_field="step", tag="say", forbid_unknown_fields=True):
    """A scripted answer without a tool call: it ends the turn."""

    text: str


class Call(Checked, frozen=True, tag_field="step", tag="call", forbid_unknown_fields=True):
    """A scripted tool call. `text` is said along with it."""

    tool: str
    arguments: Json = {}
    text: str = ""


class Calls(Checked, frozen=True, tag_field="step", tag="calls", forbid_unknown_fields=True):
    """Several tool calls in one answer."""

    calls: tuple[Call, ...]
    text: str = ""


class Fail(Checked, frozen=True, tag_field="step", tag="fail", forbid_unknown_fields=True):
    """A scripted failure of the model. `error` is the kind of a ModelError, e.g. `model_unavailable`."""

    error: str
    message: str = "scripted failure"


class Hang(Checked, frozen=True, tag_field="step", tag="hang", forbid_unknown_fields=True):
    """The model does not answer for `seconds`; for tests of interrupt and pause."""

    seconds: float = 3600.0
    text: str = ""
    """Streamed before: the beginning of an answer. Interrupted then, it is the answer that was due."""


Step = Say | Call | Calls | Fail | Hang


class ScriptedLLM(
    Checked, frozen=True, kw_only=True, tag_field="kind", tag="scripted", forbid_unknown_fields=True
):
    """A model without a model: it gives the steps one after the other. Data, so it works remotely, too.

    The n-th answer of a conversation is step n; after the last step, or when `repeat` is set, it
    goes on with the last step for ever.
    """

    steps: tuple[Step, ...]
    model: str = "scripted"
    repeat: bool = False
    """Give the last step again when the script is over; otherwise the model then says `The script is over.`"""


Model = LLM | ScriptedLLM


class ToolSpec(Checked, frozen=True, kw_only=True):
    """What a model is told about a tool."""

    name: ToolName
    description: str
    parameters: Json
    """JSON Schema of the arguments, an object."""
    read_only: bool = False
    """Changes nothing: may run at the same time as others and needs no approval."""
    idempotent: bool = False
    """A call may be run again when nobody knows whether it was carried out; `read_only` implies it."""


class MiddlewareSpec(Checked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A feature of an agent, by the name under which the place where the agent runs knows it."""

    kind: Name
    options: Json = {}
    """Its fields."""


DEFAULT_TOOLS = ("terminal", "file_editor", "task_tracker", "think", "finish")


class AgentSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An Agent as it crosses the wire."""

    llm: Model
    tools: tuple[str, ...] = DEFAULT_TOOLS
    """Names of built-in tools."""
    client_tools: tuple[ToolSpec, ...] = ()
    """Tools that run in the client's process."""
    instructions: str = ""
    """Added to the system prompt."""
    middleware: tuple[MiddlewareSpec, ...] = ()
    """Features beside those of every agent, in this order."""


class Sandbox(Checked, frozen=True, forbid_unknown_fields=True):
    """A container that the server manages for one conversation.

    Its root file system is read-only, but for the workspace `/workspace`, `/tmp` and a small `/run`; it runs as
    user 10001 without capabilities. Sizes are a number with a unit of `b`, `k`, `m`, `g` (powers of 1024).
    """

    image: Label
    """Any Linux image; nothing has to be installed in it."""
    cpus: Annotated[float, Meta(gt=0, le=1024)] = 1.0
    memory: str = "512m"
    """At least 32m; there is no swap. What is written to `/run` counts."""
    pids: Annotated[int, Meta(ge=16, le=65536)] = 256
    disk: str | None = None
    """Of the workspace; None: the server's default, where its machine can limit it. A size that cannot be
    enforced is refused."""
    network: Literal["none", "egress", "bridge"] = "none"
    env: dict[Variable, OsText] = {}
    """For its commands; they are not in the container's configuration."""
    mounts: tuple[Mount, ...] = ()
    """`/host/path:/path/in/it[:ro]`, below the folders the server allows."""
    gpus: Gpus | None = None
    """`all`, a number, or ids separated by commas."""
    idle_ttl: Annotated[float, Meta(ge=1)] | None = None
    """Seconds without use until the container is stopped; its workspace stays, the next use starts it again.
    None: the server's `idle_seconds`."""
    runtime: Literal["runc", "runsc"] | None = None
    """None: what the server prefers. Another one is never taken in its place."""
    platform: Platform | None = None
    """E.g. `linux/amd64`; None: the engine's own."""
    pull: Literal["missing", "always", "never"] = "missing"
    snapshot: Name | None = None
    """Id of a snapshot whose content the workspace begins with."""
    tmp: str | None = None
    """Of `/tmp` and what else is writable but no workspace, together; it is empty at each start of the container.
    None: as much as the workspace."""
    writable: tuple[Folder, ...] = ()
    """Further folders that commands may write, absolute; empty at each start of the container."""
    profile: Literal["locked", "task"] = "locked"
    """`task`: the root file system is that of the image and writable, commands begin in the image's working folder as
    its user, and may be run as others. What is written outside of `/workspace` goes with the container. The server has
    to allow it."""
    user: User | None = None
    """With `task`: root, or a user of the image by name or number. None: the image's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory", "disk", "tmp"):
            size = getattr(self, name)
            if size is not None and not _SIZE.fullmatch(size.strip().lower()):
                raise InvalidParams(
                    f"{name}: {size[:64]!r} is no size; write a number and a unit, like 512m", field=name
                )


class WorkspaceSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The workspace a new conversation gets on a server."""

    working_dir: str | None = None
    """An existing folder of the server's machine; None: a fresh one in the server's data folder."""
    share: str | None = None
    """Id of a conversation whose workspace is used, too."""
    sandbox: Sandbox | None = None


class ConfirmationPolicy(Checked, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which tool calls wait for an approval."""

    mode: Literal["never", "always", "writes"] = "never"
    """`writes`: every tool that is not read-only."""
    tools: tuple[str, ...] = ()
    """These tools wait whatever the mode is."""


class Limits(Struct, frozen=True, kw_only=True):
    """What one end of a connection accepts; each end publishes its own in `initialize`."""

    frame_bytes: int = 1 << 20
    """Longest text frame; longer messages travel in pieces."""
    message_bytes: int = 64 << 20
    """Longest JSON-RPC message, whole or in pieces."""
    payload_bytes: int = 64 << 10
    """Longest payload of a binary frame."""
    calls: int = 64
    """Calls that one end may have in flight at once."""
    window_bytes: int = 1 << 20
    """Credit of a byte stream at its start."""
    queue_bytes: int = 4 << 20
    """Events that may wait for one reader; beyond it the connection is closed with 4408."""
    json_depth: int = 64
    """How deep JSON may be nested."""
