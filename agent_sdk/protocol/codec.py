"""JSON-RPC 2.0 without I/O: no socket, no clock, no task.

Theory of operation. Both sides use the same class. Outgoing: `request`, `notification`, `response`
and `failure` turn a message into JSON bytes. Incoming: `receive` turns a frame into a message. All that
is remembered in between are the long messages that arrived in part; who waits for which answer, and which
calls are owed one, is known where they are waited for and answered.

A call that cannot be accepted raises a typed error; `refusal` makes the answer to it. What cannot
be answered (a notification or an answer that makes no sense) is ignored and counted in `ignored`.
Binary frames that break the rules raise BadBinaryHeader: nobody knows any more what follows, and
the connection has to be closed.

The accepting side is strict: it refuses what a JSON parser lets pass, nesting and repeated members. Both questions are
asked cheaply first (counting bytes), exactly only when the cheap answer is not enough.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.checks import flaw
from agent_sdk.protocol.errors import (
    AgentServerError,
    BadBinaryHeader,
    BadId,
    BatchNotSupported,
    DuplicateKey,
    ErrorObject,
    InvalidParams,
    InvalidRequest,
    LimitExceeded,
    MaxDepth,
    MethodNotFound,
    ParseError,
    to_wire,
)
from agent_sdk.protocol.methods import NOTICES, all_methods
from agent_sdk.protocol.methods.method import Method, Notice, without_defaults
from agent_sdk.protocol.specs import Limits

Id = int | str
M = TypeVar("M", bound="Method[Any] | Notice")

DEFAULTS = Limits()
EVENTS, MESSAGES = 0, 1
"""The streams of `message` frames."""

UNAWAITED = "answer nobody awaits"

CHECKED_BYTES = 1 << 20
"""Longer messages, which come in pieces, are not checked for nesting and repeated keys: hostile ones
could keep the event loop busy for seconds. The parser's own recursion limit holds for them."""

_ID_LIMIT = 2**53
_ID_LENGTH = 128
_SHOWN = 64
_INTEGER = re.compile(rb"-?[0-9]{1,16}")
_WHERE = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_NO_PARAMS, _NULL = Raw(b"{}"), Raw(b"null")
_VERSION = b'"2.0"'


class Request(Struct, frozen=True):
    """A call that wants an answer."""

    id: Id
    method: str
    params: Raw


class Notification(Struct, frozen=True):
    """A known notice; nobody answers it."""

    method: str
    params: Raw


class Response(Struct, frozen=True):
    """The answer to a call of ours."""

    id: Id
    result: Raw


class Failure(Struct, frozen=True):
    """The other answer to a call of ours."""

    id: Id
    error: ErrorObject


Message = Request | Notification | Response | Failure


class _Envelope(Struct, frozen=True):
    """Everything stays raw, so that one wrong member does not hide the others."""

    jsonrpc: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET
    method: Raw | UnsetType = UNSET
    params: Raw | UnsetType = UNSET
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET


class _Error(Struct, frozen=True):
    code: int
    message: str = ""
    data: Any = None


class _Call(Struct, frozen=True):
    jsonrpc: str
    id: Id | UnsetType
    method: str
    params: Any


class _Answer(Struct, frozen=True):
    jsonrpc: str
    id: Id | None
    result: Any = UNSET
    error: ErrorObject | UnsetType = UNSET


_encode = msgspec.json.Encoder().encode
_envelope = msgspec.json.Decoder(_Envelope)
_text = msgspec.json.Decoder(str)
_error = msgspec.json.Decoder(_Error)
_NOTICES = frozenset(notice.method for notice in NOTICES)


class Room(Protocol):
    """Memory for messages that arrive in pieces."""

    def take(self, size: int) -> None:
        """Hold so many bytes; raises Overloaded where there is no room."""
        ...

    def give(self, size: int) -> None:
        """Give bytes back."""
        ...


class Codec:
    """Messages of one connection, both ways."""

    def __init__(self, limits: Limits = DEFAULTS, *, strict: bool = False, room: Room | None = None) -> None:
        """Make an end that accepts what `limits` allow.

        Args:
            limits: ours.
            strict: add the checks of the accepting side.
            room: where messages that arrive in pieces are held; None: where there is always room.
        """
        self.ignored: Counter[str] = Counter()
        """How often something was ignored, by reason."""
        self._limits = limits
        self._room = room
        self._strict = strict
        self._last_id = 0
        self._partial: dict[int, bytearray] = {}

    def request(self, method: str, params: Any) -> tuple[int, bytes]:
        """Return a call under a fresh id, as JSON; params at their default are left out.

        Raises:
            InvalidParams: the params cannot be written as JSON, e.g. text with lone surrogates.
        """
        self._last_id += 1
        return self._last_id, _written(_Call("2.0", self._last_id, method, without_defaults(params)))

    def notification(self, method: str, params: Any) -> bytes:
        """Return a notification as JSON."""
        return _written(_Call("2.0", UNSET, method, params))

    def response(self, id: Id, result: Any) -> bytes:
        """Return the answer to their call. An exception from the encoder leaves the call unanswered."""
        return _encode(_Answer("2.0", id, result))

    def failure(self, id: Id | None, error: ErrorObject) -> bytes:
        """Return the error of their call; id None: to something that had no legible id."""
        return _encode(_Answer("2.0", id, error=error))

    def refusal(self, exc: AgentServerError) -> bytes:
        """Return the answer to what `receive` refused. A call that is under way stays under way."""
        return self.failure(exc.details.get("id"), to_wire(exc))

    def receive(self, frame: bytes | bytearray, *, text: bool) -> Message | frames.BinaryFrame | None:
        """Return the message in a frame; None: part of a longer one, or something that is ignored.

        Raises:
            ParseError, InvalidRequest, MethodNotFound: a message that is refused; `refusal` makes the answer.
            BadBinaryHeader, LimitExceeded, Overloaded: the connection has to be closed.
        """
        if text:
            return self._message(frame)
        content = frames.unpack(bytes(frame))
        if not isinstance(content, frames.Piece):
            return content
        whole = self._assemble(content)
        return None if whole is None else self._message(whole)

    def _assemble(self, piece: frames.Piece) -> bytearray | None:
        if piece.stream not in (EVENTS, MESSAGES):
            raise BadBinaryHeader(f"stream {piece.stream} carries no messages")
        parts = self._partial.setdefault(piece.stream, bytearray())
        if piece.offset != len(parts):
            raise BadBinaryHeader(f"a piece for position {piece.offset} instead of {len(parts)}")
        if (got := len(parts) + len(piece.payload)) > self._limits.message_bytes:
            limit = self._limits.message_bytes
            raise LimitExceeded(
                f"a message of more than {limit} bytes", field="message", limit=limit, got=got
            )
        if self._room is not None:
            self._room.take(len(piece.payload))
        parts += piece.payload
        if not piece.last:
            return None
        if self._room is not None:
            self._room.give(got)
        return self._partial.pop(piece.stream)

    def _message(self, text: bytes | bytearray) -> Message | None:
        wire = self._parse(text)
        if wire.method is UNSET:
            return self._answer(wire)
        if wire.id is UNSET:
            return self._notice(wire)
        id = _legible(wire.id)
        if wire.jsonrpc is UNSET or bytes(wire.jsonrpc) != _VERSION:
            raise InvalidRequest('`jsonrpc` is not "2.0"', id=id)
        if wire.result is not UNSET or wire.error is not UNSET:
            raise InvalidRequest("both a call and an answer", id=id)
        method = _name(wire.method)
        if method is None:
            raise unknown_method(bytes(wire.method).decode(errors="replace"), id=id)
        return Request(id, method, _NO_PARAMS if wire.params is UNSET else wire.params)

    def _parse(self, text: bytes | bytearray) -> _Envelope:
        depth = self._limits.json_depth
        checked = self._strict and len(text) <= CHECKED_BYTES
        if checked:
            check_depth(text, depth)
        try:
            if not text.isascii():
                text.decode()
            wire = _envelope.decode(text)
        except UnicodeDecodeError as exc:
            raise ParseError(f"not UTF-8 (byte {exc.start})") from None
        except RecursionError:
            raise MaxDepth(f"max_depth {depth}", limit=depth) from None
        except msgspec.ValidationError as exc:
            if text.lstrip()[:1] == b"[":
                raise BatchNotSupported("batches are not supported") from None
            raise InvalidRequest(f"not a JSON-RPC message: {str(exc).replace('`', '')}") from None
        except msgspec.DecodeError as exc:
            if checked and b"\\u" in text:
                self._refuse_surrogates(text)
            where = "" if "(byte " in str(exc) else f" (byte {len(text)})"
            raise ParseError(f"{exc}{where}") from None
        if checked and repeats_a_member(text):
            raise DuplicateKey("a member of the message occurs twice", **_id_of(wire))
        return wire

    def _refuse_surrogates(self, text: bytes | bytearray) -> None:
        """Blame the params for what is legible but for lone surrogates in them."""
        try:
            wire = _envelope.decode(without_lone_surrogates(text))
        except (msgspec.DecodeError, RecursionError):
            return
        if wire.method is not UNSET and wire.params is not UNSET and wire.id is not UNSET:
            raise InvalidParams("$.params: a lone surrogate is no text", **_id_of(wire))

    def _notice(self, wire: _Envelope) -> Notification | None:
        assert wire.method is not UNSET
        method = _name(wire.method)
        if method in _NOTICES and wire.jsonrpc is not UNSET and bytes(wire.jsonrpc) == _VERSION:
            assert method is not None
            return Notification(method, _NO_PARAMS if wire.params is UNSET else wire.params)
        self.ignored["call without id" if method in all_methods() else "unknown notice"] += 1
        return None

    def _answer(self, wire: _Envelope) -> Response | Failure | None:
        if (wire.result is UNSET) and (wire.error is UNSET):
            raise InvalidRequest("neither a call nor an answer", **_id_of(wire))
        try:
            id = _legible(wire.id or _NULL)
        except BadId:
            self.ignored[UNAWAITED] += 1
            return None
        if wire.error is UNSET:
            assert wire.result is not UNSET
            return Response(id, wire.result)
        error = _legible_error(wire.error)
        if error is None or wire.result is not UNSET:
            self.ignored["illegible answer"] += 1
            return None
        return Failure(id, error)


def id_in_flight(id: Id) -> BadId:
    """Return the error for a second call under an id whose first one has no answer yet."""
    return BadId(f"id {_shown(str(id))} is in flight", id=id)


def unknown_method(name: str, **details: Any) -> MethodNotFound:
    """Return the error for a method that does not exist here; a hostile name is escaped and cut."""
    shown = _shown(name)
    return MethodNotFound(f"no method {shown}", method=shown, **details)


def decode_params(method: type[M], params: Raw) -> M:
    """Return the params of a method or notice.

    Raises:
        InvalidParams: they do not fit; the message names the place, e.g.
            `$.params.timeout_ms: expected int, got str`.
    """
    try:
        decoder: msgspec.json.Decoder[M] = _decoder(method)  # type: ignore[arg-type] # a class is hashable
        return decoder.decode(params)
    except msgspec.DecodeError as exc:
        reason = _plain(str(exc))
    except UnicodeDecodeError as exc:
        reason = f"$.params: not UTF-8 ({exc.reason})"
    except RecursionError:
        reason = "$.params: nested too deeply"
    raise InvalidParams(reason)


@cache
def _decoder(cls: type) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cls)


def _written(message: Struct) -> bytes:
    try:
        return _encode(message)
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as exc:
        params = getattr(message, "params", None)
        named = msgspec.structs.asdict(params) if isinstance(params, Struct) else params or {}
        for name, value in named.items():
            if wrong := flaw(value):
                raise InvalidParams(f"$.params.{name}: {wrong}", field=name) from None
        raise InvalidParams(f"$.params: cannot be written as JSON: {exc}") from None


def _legible(raw: Raw) -> Id:
    """Return the id of a call.

    Raises:
        BadId: it is none.
    """
    text = bytes(raw)
    if text[:1] == b'"' and len(text) <= 6 * _ID_LENGTH + 2:
        id = _text.decode(text)
        if 1 <= len(id) <= _ID_LENGTH:
            return id
    elif _INTEGER.fullmatch(text) and abs(number := int(text)) <= _ID_LIMIT:
        return number
    raise BadId(f"an id is a string of 1..{_ID_LENGTH} characters or an integer within ±2**53")


def _id_of(wire: _Envelope) -> dict[str, Id]:
    if wire.id is UNSET:
        return {}
    try:
        return {"id": _legible(wire.id)}
    except BadId:
        return {}


def _name(raw: Raw) -> str | None:
    text = bytes(raw)
    return _text.decode(text) if text[:1] == b'"' else None


def _legible_error(raw: Raw) -> ErrorObject | None:
    try:
        error = _error.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None
    data = error.data if isinstance(error.data, dict) else {}
    return ErrorObject(error.code, error.message, data)


def _shown(text: str) -> str:
    return text[:_SHOWN].encode("unicode_escape").decode()[:_SHOWN]


def _plain(message: str) -> str:
    """`Expected `int`, got `str` - at `$.a`` becomes `$.params.a: expected int, got str`."""
    match = _WHERE.fullmatch(message)
    assert match is not None
    what = match["what"].replace("`", "")
    shown = what[:200].encode("unicode_escape").decode()
    return f"$.params{match['path'] or ''}: {shown[:1].lower()}{shown[1:]}"


# Possessive quantifiers: no backtracking, so neither time nor memory grows beyond the input.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# Every escape in turn, so that an escaped backslash before a `u` is not taken for one; a pair counts as one.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_INNERMOST = re.compile(rb"\[:*+\]")
_ALIKE = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))
_MEMBERS = (b'"jsonrpc"', b'"id"', b'"method"', b'"params"', b'"result"', b'"error"')

_members = msgspec.json.Decoder(dict[str, Raw])


def check_depth(text: bytes | bytearray, limit: int) -> None:
    """Refuse JSON that is nested more than `limit` levels deep.

    Raises:
        MaxDepth: it is.
    """
    if text.count(b"[") + text.count(b"{") <= limit:
        return
    brackets = _STRING.sub(b"", text).translate(_ALIKE, _NOT_BRACKETS)
    too_many = b"[" * (limit + 1)
    for _ in range(limit):
        if b"[]" not in brackets or too_many in brackets:
            break
        brackets = brackets.replace(b"[]", b"")  # takes one level, everywhere
    if b"[" in brackets:
        raise MaxDepth(f"max_depth {limit}", limit=limit)


def without_lone_surrogates(text: bytes | bytearray) -> bytes:
    """Return the JSON with U+FFFD for escapes that are half of a pair, which no UTF-8 text can hold."""
    return _ESCAPE.sub(lambda found: b"\\ufffd" if found["lone"] else found[0], text)


def repeats_a_member(text: bytes | bytearray) -> bool:
    """Return whether a key of this valid JSON object occurs twice at its top level, however it is spelt."""
    if b"\\u" not in text and max(map(text.count, _MEMBERS)) <= 1:
        return False
    structure = _STRING.sub(b"", text).translate(_ALIKE, _NOT_STRUCTURE)
    while structure.count(b"[") > 1:
        structure = _INNERMOST.sub(b"", structure)
    return structure.count(b":") != len(_members.decode(text))
