"""Every error that may cross the wire. The class tree is the error table.

AgentServerError
    ParseError          -32700
        MaxDepth
    InvalidRequest      -32600
        BadId, DuplicateKey, BatchNotSupported, BadBinaryHeader, TooManySubprotocols
    MethodNotFound      -32601      InvalidParams   -32602      InternalError   -32603
    Cancelled           -32800
    Overloaded          -32001      NotInitialised  -32002
    Unauthorized        -32003 (PermissionError)
        UseHeader
    NotFound            -32004 (LookupError)
        ConversationNotFound, ProcessNotFound, RequestNotFound
        PathNotFound (FileNotFoundError)
    Conflict            -32005
        OpMismatch, OpExpired, TurnInProgress, TransferBroken, ChangedDuringRead,
        PathExists (FileExistsError), HistoryLost, ConversationDamaged, StateConflict
            TurnWaits
    LimitExceeded       -32006
        StorageFull (OSError)
    TimedOut            -32007 (TimeoutError)
        CommandTimeout
    WorkspaceUnavailable -32008
        WorkspaceLost (ConnectionError)
            OutcomeUnknown
        EngineUnavailable, ImageUnavailable, IsolationUnavailable, ProfileMismatch, RemoteApiError
    LeaseLost           -32010
    PolicyDenied        -32011 (PermissionError)
        OutsideWorkspace, OriginNotAllowed, HostNotAllowed
    PathError           -32012 (OSError)
        NotARegularFile, NotADirectory (NotADirectoryError), IsADirectory (IsADirectoryError),
        PathDenied (PermissionError)
    ModelError          -32013
        ModelRefused, ModelUnavailable, ModelRateLimited, ModelUnauthorized, ModelAnswerBroken
            ModelAnswerTooLarge
    ToolError           -32014
    ConnectionLost      (ConnectionError) never sent: it says that nothing can be sent

The JSON-RPC code is the coarse class; the exact identity is `data.kind`, one per exception class
(JSON-RPC 2.0 section 5.1 reserves -32000..-32099 for the implementation; MCP reserved -32020 and
below in 2026, so ours stay in -32000..-32019). `data.retryable` is always there: whether the very
same call may succeed later without anybody changing it.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import msgspec

_BY_KIND: dict[str, type[AgentServerError]] = {}
_BY_CODE: dict[int, type[AgentServerError]] = {}


class ErrorObject(msgspec.Struct, frozen=True, omit_defaults=True):
    """The `error` member of a JSON-RPC response."""

    code: int
    message: str
    data: dict[str, Any] = {}


class AgentServerError(Exception):
    """Root of everything this project raises on purpose.

    Attributes:
        code: JSON-RPC code of the class; None for a class that never crosses the wire.
        kind: the exact identity on the wire, snake case, one per class.
        retryable: whether the same call may succeed later, unchanged.
        details: JSON-able facts about this one occurrence, listed by each subclass.
    """

    code: ClassVar[int | None] = None
    kind: ClassVar[str] = ""
    retryable: ClassVar[bool] = False

    def __init_subclass__(cls, code: int | None = None, retryable: bool | None = None) -> None:
        if code is not None:
            cls.code = code
            if _BY_CODE.setdefault(code, cls) is not cls:
                raise TypeError(f"code {code} already belongs to {_BY_CODE[code].__name__}")
        if retryable is not None:
            cls.retryable = retryable
        cls.kind = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        if _BY_KIND.setdefault(cls.kind, cls) is not cls:
            raise TypeError(f"kind {cls.kind} already belongs to another class")

    def __init__(self, message: str = "", **details: Any) -> None:
        message = visible(message)  # it may quote what a container or a stranger said
        super().__init__(message)
        self.message = message or self.kind
        self.details = details

    def __str__(self) -> str:
        return self.message

    @property
    def retry_after_ms(self) -> int | None:
        """Milliseconds to wait before a retry, where the raiser knows."""
        value = self.details.get("retry_after_ms")
        return value if isinstance(value, int) else None


class ParseError(AgentServerError, code=-32700):
    """The frame is not JSON."""


class InvalidRequest(AgentServerError, code=-32600):
    """The frame is JSON, but no JSON-RPC message that can be accepted now. Details: id (may be absent)."""


class MethodNotFound(AgentServerError, code=-32601):
    """No such method. Details: method (cut to 64 characters)."""


class InvalidParams(AgentServerError, code=-32602):
    """The params do not fit the method; the message names the field as a JSON path."""


class InternalError(AgentServerError, code=-32603):
    """A bug on the other side. Details: incident, the id under which it is logged there."""


class MiddlewareFailed(InternalError):
    """A middleware of the agent raised, or returned what it must not. Details: middleware, its kind."""


class MaxDepth(ParseError):
    """The JSON is nested too deeply. Details: limit."""


class BadId(InvalidRequest):
    """The id is no string of 1..128 characters and no integer within +-2**53, or it is in flight."""


class DuplicateKey(InvalidRequest):
    """A member of the JSON-RPC envelope occurs twice."""


class BatchNotSupported(InvalidRequest):
    """JSON-RPC batches break order and backpressure; send single messages."""


class BadBinaryHeader(InvalidRequest):
    """A binary frame breaks the rules; the connection is closed with 4400."""


class Cancelled(AgentServerError, code=-32800):
    """The caller cancelled the call (the number is the Language Server Protocol's)."""


class TooManySubprotocols(InvalidRequest):
    """The upgrade request offers more WebSocket subprotocols than anybody needs. Details: limit."""


class Overloaded(AgentServerError, code=-32001, retryable=True):
    """Too much at once. Details: limit, retry_after_ms."""


DRAINING = "draining"
RETRY_AFTER_MS = 1000


def draining() -> Overloaded:
    """Return the refusal of a process that is about to end: nothing was done, and the next one takes the call."""
    return Overloaded(
        "the server is stopping; call again in a moment", reason=DRAINING, retry_after_ms=RETRY_AFTER_MS
    )


class NotInitialised(AgentServerError, code=-32002):
    """The first message of a connection must be `initialize`."""


class Unauthorized(AgentServerError, PermissionError, code=-32003):
    """No key, or a wrong one."""


class UseHeader(Unauthorized):
    """The key came in a query parameter, a cookie or another scheme; it belongs in `Authorization: Bearer KEY`."""


class NotFound(AgentServerError, LookupError, code=-32004):
    """What was named does not exist."""


class ConversationNotFound(NotFound):
    """Details: conversation."""


class ProcessNotFound(NotFound):
    """No such process in this workspace, or it has ended. Details: process."""


class RequestNotFound(NotFound):
    """No such request waits for an answer. Details: request."""


class PathNotFound(NotFound, FileNotFoundError):
    """Details: path, as the workspace sees it."""


class Conflict(AgentServerError, code=-32005):
    """The call contradicts the present state."""


class OpMismatch(Conflict):
    """The same op_id came with other params. Details: op_id."""


class OpExpired(Conflict):
    """The op_id is too old: its result is no longer kept, and it is not run again. Details: op_id."""


class StateConflict(Conflict):
    """The conversation is not in a state that allows the call. Details: state."""


class TurnWaits(StateConflict):
    """The turn cannot go on before somebody does something; it goes on then. Details: what, request_id."""


class HistoryLost(Conflict):
    """The events after a cursor are gone: what was built from the history is void. Details: epoch, from_seq."""


class ConversationDamaged(Conflict):
    """The log of the conversation is damaged in its middle; nothing of it is served. Details: conversation, seq."""


class TurnInProgress(Conflict):
    """A turn runs. Details: run_id."""


class TransferBroken(Conflict, retryable=True):
    """A file did not arrive whole: size or digest differ, or it changed meanwhile. Nothing was kept."""


class ChangedDuringRead(Conflict, retryable=True):
    """The file changed while it was read; nothing was kept. Details: path."""


class PathExists(Conflict, FileExistsError):
    """Details: path."""


class LimitExceeded(AgentServerError, code=-32006):
    """More than a published limit allows. Details: field, limit, got."""


class StorageFull(LimitExceeded, OSError, retryable=True):
    """No space is left where it had to be written. Details: path."""


class TimedOut(AgentServerError, TimeoutError, code=-32007, retryable=True):
    """The time given for the call is over. Details: seconds."""


class CommandTimeout(TimedOut):
    """A command was killed when its time was over. Details: seconds."""


class WorkspaceUnavailable(AgentServerError, code=-32008, retryable=True):
    """The place where commands run cannot be reached or did not start. Details: phase (`engine`, `image`, `pull`,
    `create`, `start`, `ready`, `profile`, `silent`, …)."""


class WorkspaceLost(WorkspaceUnavailable, ConnectionError):
    """The place where commands ran is gone; what ran in it has an unknown outcome."""


class OutcomeUnknown(WorkspaceLost, retryable=False):
    """An operation may have begun when the place where it ran was lost; it is not run again. Details: op_id."""


class EngineUnavailable(WorkspaceUnavailable):
    """The container engine is absent, does not answer, or failed. Details: phase, status (HTTP)."""


class ImageUnavailable(WorkspaceUnavailable, retryable=False):
    """The image is not there, cannot be pulled, is not allowed, or cannot run here. Details: image, phase."""


class IsolationUnavailable(WorkspaceUnavailable, retryable=False):
    """The isolation that was asked for cannot be had on this machine. Details: wanted."""


class ProfileMismatch(WorkspaceUnavailable, retryable=False):
    """What is in force in a sandbox differs from what was asked for; it was ended. Details: differences."""


class RemoteApiError(WorkspaceUnavailable):
    """A Runtime API refused or failed. Details: status (HTTP), phase."""


class LeaseLost(AgentServerError, code=-32010):
    """Another server owns the conversation now."""


class PolicyDenied(AgentServerError, PermissionError, code=-32011):
    """A rule forbids it."""


class OutsideWorkspace(PolicyDenied):
    """The path leads out of the workspace. Details: path."""


class OriginNotAllowed(PolicyDenied):
    """A web page of another origin asked. Details: origin."""


class HostNotAllowed(PolicyDenied):
    """The Host header names somebody else. Details: host."""


class PathError(AgentServerError, OSError, code=-32012):
    """The operating system refused a path. Details: path, errno (its name, such as EACCES)."""


class NotARegularFile(PathError):
    """A device, socket, FIFO or folder where a file is needed. Details: path."""


class NotADirectory(PathError, NotADirectoryError):
    """Details: path."""


class IsADirectory(PathError, IsADirectoryError):
    """Details: path."""


class PathDenied(PathError, PermissionError):
    """The file system denies access. Details: path."""


class ModelError(AgentServerError, code=-32013):
    """The model did not answer properly. Details: status (HTTP), provider."""


class ModelRefused(ModelError):
    """The provider rejected the request itself; repeating it will not help. Details: status."""


class ModelUnauthorized(ModelError, PermissionError):
    """The provider does not accept the key. Details: status."""


class ModelRateLimited(ModelError, retryable=True):
    """Too many requests or no quota. Details: status, retry_after_ms."""


class ModelUnavailable(ModelError, retryable=True):
    """The provider failed or cannot be reached. Details: status."""


class ModelAnswerBroken(ModelError, retryable=True):
    """The answer stopped in the middle or makes no sense."""


class ModelAnswerTooLarge(ModelAnswerBroken, retryable=False):
    """The answer has more than is taken; another one would cost as much and hardly be shorter. Details: limit."""


class ToolError(AgentServerError, code=-32014):
    """A tool could not do what was asked; the model reads the message."""


class ConnectionLost(AgentServerError, ConnectionError, retryable=True):
    """The connection is gone. Details: close_code (of the WebSocket, when there was one), reason."""


def to_wire(exc: BaseException) -> ErrorObject:
    """Turn an exception into JSON; the one place that does. A bug's text and traceback stay home."""
    if isinstance(exc, AgentServerError) and exc.code is not None:
        details = _as_utf8(exc.details)
        return ErrorObject(exc.code, exc.message, {**details, "kind": exc.kind, "retryable": exc.retryable})
    if isinstance(exc, ConnectionLost):
        return to_wire(WorkspaceLost(exc.message))
    return ErrorObject(-32603, "internal error", {"kind": InternalError.kind, "retryable": False})


def _as_utf8(value: Any) -> Any:
    """Return a detail with what is no UTF-8 in it escaped, as in the message: JSON has no way to carry it."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {key: _as_utf8(each) for key, each in value.items()}
        case list() | tuple():
            return [_as_utf8(each) for each in value]
    return value


def from_wire(error: ErrorObject) -> AgentServerError:
    """Turn JSON into an exception; the one place that does.

    An unknown kind becomes the class of its code, an unknown code an InternalError. No class is
    ever looked up by a name that the peer sent, other than in the table of this module.
    """
    details = {key: value for key, value in error.data.items() if key not in ("kind", "retryable", "message")}
    by_kind = _BY_KIND.get(str(error.data.get("kind")))
    if by_kind is None or by_kind.code != error.code:
        by_kind = _BY_CODE.get(error.code, InternalError)
    return by_kind(error.message, **details)


def table() -> list[type[AgentServerError]]:
    """Return all classes that may cross the wire, in the order of their definition."""
    return [cls for cls in _BY_KIND.values() if cls.code is not None]


# C0 but tab and newline, DEL, C1; soft hyphens, joiners and fillers that show nothing; what reorders text; halves of
# pairs; the tag characters, in which whole sentences hide.
_TRICKS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """Return the text with such characters escaped; tabs and newlines stay, CR LF becomes a newline."""
    return _TRICKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def shown(text: str) -> str:
    """Return the text with such characters escaped, tabs and newlines among them."""
    escaped = _TRICKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return escaped.replace("\t", "\\t").replace("\n", "\\n")


def visible_json(text: bytes) -> bytes:
    """Return the same JSON with such characters as escapes of JSON: it says what it said, to programs."""
    if text.isascii() and b"\x7f" not in text:
        return text
    return _TRICKS.sub(_as_json, text.decode()).encode()


def _as_json(found: re.Match[str]) -> str:
    if found[0] < " ":
        return found[0]  # between the values: inside of them JSON has escaped it already
    units = found[0].encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
