"""The reference of the protocol, printed from the classes: docs/protocol.md and docs/openrpc.json.

python -m agent_sdk.protocol.document docs            # write both
python -m agent_sdk.protocol.document --check docs    # exit 1 when one is stale
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from agent_sdk.protocol import events, frame
from agent_sdk.protocol.errors import table
from agent_sdk.protocol.methods import GROUPS, NOTICES
from agent_sdk.protocol.methods.method import Method, result_type
from agent_sdk.protocol.openrpc import (
    SUMMARIES,
    field_docs,
    openrpc,
    result_name,
    said,
    structs_in,
)
from agent_sdk.protocol.specs import PROTOCOL_VERSION, SUBPROTOCOL, Limits

CLOSE_CODES = (
    (1000, "no", "One side is done."),
    (1006, "yes", "No close frame came: the connection broke."),
    (1002, "no", "The rules of WebSocket were broken, e.g. by a frame without a mask."),
    (1007, "no", "A text frame was not UTF-8."),
    (
        1008,
        "no",
        "More than 64 KiB before `initialize`, 4096 fragments in a message, or 100 control frames in a second.",
    ),
    (1009, "no", "A frame was longer than `limits.frame_bytes`."),
    (1011, "yes", "A bug; the reason names the incident under which it is logged."),
    (4400, "no", "The rules of frames were broken, e.g. `bad_binary_header`."),
    (4401, "no", "No key, a wrong one, one that does not count any more, or no `initialize` within 10 s."),
    (4404, "no", "No such conversation, or it was deleted."),
    (4408, "yes", "The reader is too slow; resume after the last `seq`."),
    (4413, "no", "A message was longer than `limits.message_bytes`."),
    (
        4429,
        "yes",
        "Too many connections without a key, too many wrong keys, or no memory for a long message now.",
    ),
    (4503, "yes", "The server is stopping."),
)

ADDRESSES = (
    (
        "GET",
        "/health",
        "no",
        'It lives: `{"status": "ok"}`, or `degraded` and what it cannot do. `HEAD`, too.',
    ),
    ("GET", "/ready", "no", "Whether new work is welcome: 200, or 503 while it stops."),
    (
        "GET",
        "/metrics",
        "yes",
        "The text format of Prometheus. `metrics_key` of the server opens this alone.",
    ),
    ("GET", "/openrpc.json", "yes", "All methods, as an OpenRPC document."),
    (
        "GET",
        "/v1/conversations",
        "yes",
        "Conversations, newest first: a list of [Snapshot](#snapshot). At most `?limit=N` (1..1000), those before "
        "`?before=ID`, in `?state=STATE`, with `?tag=NAME=VALUE`, which may be repeated.",
    ),
    (
        "GET",
        "/v1/conversations/{id}",
        "or later",
        "With an upgrade: the WebSocket, bound to that conversation. `new` makes one, see `initialize`.",
    ),
    (
        "GET",
        "/v1/conversations/{id}/events",
        "yes",
        "Events after `?after=SEQ` (0), at most `?limit=N` (1..1000): `epoch`, `events`, `head_seq`. "
        "With `Accept: text/event-stream` all of them and live ones, see below.",
    ),
    ("POST", "/v1/rpc", "yes", "One call as JSON-RPC; `?conversation=ID` where it concerns one."),
)
"""Method, path, whether a key is needed, what is there."""

HTTP = """\
An error is answered with its status and `{"error": {"code", "message", "data"}}`, the error object of
JSON-RPC; where it is worth a retry with `Retry-After`.

| status | when |
| --- | --- |
| 400 | what came is no HTTP/1.1, no JSON-RPC, or does not fit, like a parameter that the address does not know |
| 401 | no key or a wrong one |
| 403 | a web page whose `Origin` is not allowed, or something else that is not |
| 404, 405 | there is no such conversation, address or method |
| 408 | the body did not arrive within 30 s |
| 409 | it contradicts the state |
| 413, 431 | the body is longer than `limits.message_bytes`; the head is longer than 8 KiB |
| 421 | `Host` is no name of the server (`allow_hosts`) |
| 426 | the address is a WebSocket, and the request no upgrade |
| 429 | too many wrong keys, connections, or bytes that are on their way |
| 503 | the server is stopping, or the workspace is not there |

### Authentication

`Authorization: Bearer KEY`, in the upgrade request as well. A browser, which cannot set it there, sends the key
as `auth` of `initialize`, within 10 s. A key in the query is refused, because it ends up in logs; cookies do not
count. After 5 wrong keys in a minute a network (an IPv4 address, an IPv6 /64, the loopback) is answered 429,
but for the right key. `Host` must be a name of the server, `Origin` absent or allowed (`allow_origins`).
The [Runtime API](runtime_api.md) has keys of its own, in `X-API-Key`.

### The WebSocket

Subprotocol `agentrpc.v1` (or none), version 13, no extensions. The server pings after 20 s of silence and gives
a connection up that does not answer within 10 s. 64 connections of a network may be without a key; for a
further one the oldest of them is closed (HTTP 429, or 4429). What all clients together have on their way in
bodies and unfinished messages has a limit (`max_incoming_bytes`, 128 MiB): then 429, or 4429. Redirects are
not to be followed: the key is for one server.

### Server-Sent Events

```
retry: 1000

id: 7
data: {"type":"agent_message","seq":7,…}

: still here
```

Each event is one message without a name, `id` its `seq`; every 15 s of silence a comment comes. `Last-Event-ID`
counts before `after`. Where the log has no such `seq` the message `event: sync.reset` with
`{"from_seq":1}` comes first, and then all events. The stream ends with the server and with the conversation.
"""

RULES = f"""\
Version {PROTOCOL_VERSION}, WebSocket subprotocol `{SUBPROTOCOL}`. The same frames travel over a
Unix socket between server and box.

## Frames

* **Text frames** hold one JSON-RPC 2.0 message each, with `"jsonrpc": "2.0"` and params by name.
  There are no batches. Both ends may call.
* A message longer than `limits.frame_bytes` must, and any message longer than 256 KiB should,
  travel in pieces: binary frames of kind `message`.
* **Binary frames** are a header of {frame.HEADER_BYTES} bytes and up to 64 KiB of payload:

| byte | 0 | 1 | 2–3 | 4–7 | 8–15 |
| --- | --- | --- | --- | --- | --- |
| big endian | version = {frame.VERSION} | kind | flags | stream | offset |

| kind | name | offset | payload |
| --- | --- | --- | --- |
| {frame.DATA} | data | position of the first byte; it may jump ahead, never back | 1..{frame.PAYLOAD_BYTES} bytes |
| {frame.END} | end | final position | trailer, at most {frame.TRAILER_BYTES} bytes |
| {frame.CREDIT} | credit | how many payload bytes may have been sent in all since the stream began | none |
| {frame.RESET} | reset | ignored | reason, UTF-8, at most {frame.TRAILER_BYTES} bytes |
| {frame.MESSAGE} | message | position in the message | a piece of a JSON-RPC message; flag {frame.LAST}: the last one |

Flags have no other meaning and are zero.

## Byte streams

* The caller opens a stream by putting a fresh number into the params of a call (`channel`, `stdin`,
  `stdout`, …): odd when it opened the connection, even otherwise. A stream flows one way; which
  way, the method says.
* A sender starts with a credit of `limits.window_bytes` of the receiver and gets more as the
  receiver consumes. Bytes that are jumped over cost no credit.
* A number that is not that of a stream the caller has just opened is refused (`invalid_params`) before
  anything begins. A refusal that comes before any effect is not kept under the `op_id`.
* A stream of a call that is answered with a result ends with an end frame, also when it carried nothing.
  Where the call fails it is reset.
* Either side may reset a stream: nothing more comes. Frames of streams that are over are ignored for
  a while.
* A stream begins with a frame of at most 4 KiB, and each may be twice as long as the one before: so something
  arrives over a connection that does not live long. Credit comes at least every quarter of a second while bytes do.
* An end that has sent nothing for half of `heartbeat_s` sends a WebSocket pong unasked: on a thin line a ping may
  be stuck behind bytes that move. Foreign clients that receive much over thin lines should do the same.
* Streams take turns, one frame each. Answers, calls, notices and credit overtake events; events
  overtake streams.
* `message` frames use stream 0 for events and stream 1 for everything else, one message after the
  other on each.

## Calls

* An id is a string of 1..128 characters or an integer within ±2**53; it may be used again after its
  answer.
* Every call is answered exactly once. A cancelled one ends with -32800; `call.cancel` says what
  became of it. `$/cancelRequest` is the same as a notification.
* Params refuse unknown fields; results, events and `initialize` tolerate them. So leave out fields of params that
  stand at their default: an older version then accepts every call that needs nothing new. A default never changes.
* At most `limits.calls` calls may be in flight; more are answered with -32001 and `retry_after_ms`.
  `ping` and `call.cancel` do not count.
* A call with an `op_id` changes something. Repeated with the same params it attaches to the running
  operation or gets the stored result; with other params it is refused with `op_mismatch`.
* JSON is nested at most `limits.json_depth` deep. A member of the envelope that occurs twice is refused.
* A refused call is answered under its id, or under `null` when it had no legible one. Answers
  nobody awaits, unknown notifications, and calls without an id are ignored.

## Events

* Durable events have a `seq` without gaps; a cursor is (`epoch`, `seq`). Those that wait together
  travel in one `events` notice.
* After `initialize` with `resume`, the events after `resume.after_seq` follow, then live ones.
* A kind you do not know is to be kept, not refused.
* `delta` notices are transient: they have no `seq` and may be left out.
"""


def protocol() -> str:
    """The reference as Markdown."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield "# The protocol\n"
    yield "Printed by `make docs` from the classes in `agent_sdk/protocol`; do not edit."
    yield "For machines: [openrpc.json](openrpc.json).\n"
    yield RULES
    yield "## HTTP\n"
    yield "| request | key | |\n| --- | --- | --- |"
    yield from (f"| `{method} {path}` | {key} | {_cell(what)} |" for method, path, key, what in ADDRESSES)
    yield ""
    yield HTTP
    yield "## Limits\n"
    yield "Each end publishes its own in `initialize`.\n"
    yield from _fields(Limits)
    for group, members in GROUPS.items():
        yield f"## Methods: {group}\n"
        yield f"{SUMMARIES[group]}\n"
        for method in members:
            yield from _method(method)
    yield "## Notices\n"
    for notice in NOTICES:
        yield f"### `{notice.method}`\n"
        yield f"{said(notice)}\n"
        yield from _fields(notice)
    yield from _events()
    yield from _types()
    yield from _errors()
    yield "## Close codes\n"
    yield "| code | worth a retry | meaning |\n| --- | --- | --- |"
    yield from (f"| {code} | {retry} | {meaning} |" for code, retry, meaning in CLOSE_CODES)


def _method(method: type[Method[Any]]) -> Iterator[str]:
    yield f"### `{method.method}`\n"
    yield f"{said(method)}\n"
    yield from _fields(method)
    name = result_name(method)
    cls = result_type(method)
    if name.startswith("list of "):
        yield f"Result: list of {_link(name.removeprefix('list of '))}.\n"
    elif cls in _own_results():
        yield f"Result `{name}`: {said(cls)}\n"
        yield from _fields(cls)
    else:
        yield f"Result: {_link(name)}.\n"


def _events() -> Iterator[str]:
    yield "## Kinds of events\n"
    yield "Every event has these fields, and `type`, its kind:\n"
    yield from _fields(events.Base)
    for tag, cls in events.kinds().items():
        yield f"### `{tag}`\n"
        yield f"{said(cls)}\n"
        yield from _fields(cls, leave_out=events.Base.__struct_fields__)
    yield "### A delta\n"
    yield f"{said(events.Delta)}\n"
    yield from _fields(events.Delta)


def _types() -> Iterator[str]:
    yield "## Types\n"
    for cls in sorted(_types_apart(), key=lambda cls: cls.__name__):
        yield f"### {cls.__name__}\n"
        yield f"{said(cls)}\n"
        tag = cls.__struct_config__.tag
        if tag is not None:
            yield f"`{cls.__struct_config__.tag_field}` is `{tag}`.\n"
        yield from _fields(cls)


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "`error.code` is the coarse class, `error.data.kind` the exact identity;"
    yield "`error.data.retryable` says whether the very same call may succeed later.\n"
    yield "| code | kind | retryable | meaning |\n| --- | --- | --- | --- |"
    codes = [cls.code for cls in table()]
    for cls in sorted(table(), key=lambda cls: codes.index(cls.code)):  # by code, in the order of the tree
        yield f"| {cls.code} | `{cls.kind}` | {'yes' if cls.retryable else 'no'} | {_cell(said(cls))} |"
    yield ""


def _fields(cls: type, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    fields = [field for field in info.fields if field.name not in leave_out]
    if not fields:
        yield "No fields.\n"
        return
    docs = field_docs(cls)
    yield "| field | type | default | |\n| --- | --- | --- | --- |"
    for field in fields:
        cells = (f"`{field.encode_name}`", _type(field.type), _default(field), docs.get(field.name, ""))
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    yield ""


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{json.dumps(field.default_factory())}`"
    if isinstance(field.default, msgspec.Struct):
        return "its defaults"
    return f"`{msgspec.json.encode(field.default).decode()}`"


def _type(info: Any) -> str:
    match info:
        case inspect.Metadata():
            return _type(info.type)
        case inspect.StructType():
            return _link(info.cls.__name__)
        case inspect.UnionType():
            return " or ".join(_type(inner) for inner in info.types)
        case inspect.LiteralType():
            return " or ".join(f"`{json.dumps(value)}`" for value in info.values)
        case inspect.ListType() | inspect.VarTupleType():
            return f"list of {_type(info.item_type)}{_bounds(info.min_length, info.max_length, 'entries')}"
        case inspect.DictType():
            return f"map of {_type(info.value_type)}{_bounds(info.min_length, info.max_length, 'entries')}"
        case inspect.StrType():
            pattern = f" matching `{info.pattern}`" if info.pattern else ""
            return f"string{_bounds(info.min_length, info.max_length, 'characters')}{pattern}"
        case inspect.IntType():
            return f"integer{_bounds(info.ge, info.le, '')}"
        case inspect.FloatType():
            more = f" > {info.gt:g}" if info.gt is not None else ""
            return f"number{more}"
        case inspect.BoolType():
            return "boolean"
        case inspect.NoneType():
            return "null"
    return "any JSON"


def _bounds(low: int | None, high: int | None, unit: str) -> str:
    if low is None and high is None:
        return ""
    return f", {'' if low is None else low}..{'' if high is None else high} {unit}".rstrip()


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _own_results() -> set[type]:
    """Results that belong to one method only: they are described there."""
    results = [result_type(method) for members in GROUPS.values() for method in members]
    inside = {inner for result in results for inner in structs_in([result]) if inner is not result}
    return {cls for cls in structs_in(results) if results.count(cls) == 1 and cls not in inside}


def _types_apart() -> list[type[msgspec.Struct]]:
    methods = [method for members in GROUPS.values() for method in members]
    shown = {*methods, *NOTICES, *events.kinds().values(), events.Delta, Limits, *_own_results()}
    used = structs_in(
        [*methods, *(result_type(method) for method in methods), *NOTICES, *events.kinds().values()]
    )
    return [cls for cls in used if cls not in shown]


def documents() -> dict[str, str]:
    """File name to content."""
    return {
        "protocol.md": protocol(),
        "openrpc.json": json.dumps(openrpc(), indent=1, ensure_ascii=False) + "\n",
    }


def main(arguments: list[str]) -> int:
    """Write the documents into a folder, or with `--check` say which are stale; returns the exit code."""
    check = "--check" in arguments
    folders = [argument for argument in arguments if argument != "--check"]
    if len(folders) != 1:
        sys.stderr.write("usage: python -m agent_sdk.protocol.document [--check] FOLDER\n")
        return 2
    stale = 0
    for name, text in documents().items():
        path = Path(folders[0], name)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{path} is stale: run make docs\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
