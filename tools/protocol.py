"""docs/protocol.md: what crosses a connection, printed from the message classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from agent_sdk.protocol import events, frame
from agent_sdk.protocol.errors import table as errors
from agent_sdk.protocol.methods import GROUPS, NOTICES
from agent_sdk.protocol.methods.method import Method, result_type
from agent_sdk.protocol.specs import PROTOCOL_VERSION, SUBPROTOCOL, Limits
from tools.docstrings import said
from tools.markdown import fields, link, table
from tools.openrpc import SUMMARIES, result_name, structs_in

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
    """Return the page."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield "# The protocol\n"
    yield "Printed by `make docs` from the classes in `agent_sdk/protocol`; do not edit."
    yield "For machines: [openrpc.json](../agent_server/openrpc.json). The addresses are in [http.md](http.md).\n"
    yield RULES
    yield "## Limits\n"
    yield "Each end publishes its own in `initialize`.\n"
    yield from fields(Limits)
    for group, members in GROUPS.items():
        yield f"## Methods: {group}\n"
        yield f"{SUMMARIES[group]}\n"
        for method in members:
            yield from _method(method)
    yield "## Notices\n"
    for notice in NOTICES:
        yield f"### `{notice.method}`\n"
        yield f"{said(notice)}\n"
        yield from fields(notice)
    yield from _events()
    yield from _types()
    yield from _errors()
    yield "## Close codes\n"
    yield from table(
        "code | worth a retry | meaning",
        *((str(code), retry, meaning) for code, retry, meaning in CLOSE_CODES),
    )


def _method(method: type[Method[Any]]) -> Iterator[str]:
    yield f"### `{method.method}`\n"
    yield f"{said(method)}\n"
    yield from fields(method)
    name = result_name(method)
    cls = result_type(method)
    if name.startswith("list of "):
        yield f"Result: list of {link(name.removeprefix('list of '))}.\n"
    elif cls in _own_results():
        yield f"Result `{name}`: {said(cls)}\n"
        yield from fields(cls)
    else:
        yield f"Result: {link(name)}.\n"


def _events() -> Iterator[str]:
    yield "## Kinds of events\n"
    yield "Every event has these fields, and `type`, its kind:\n"
    yield from fields(events.Base)
    for tag, cls in events.kinds().items():
        yield f"### `{tag}`\n"
        yield f"{said(cls)}\n"
        yield from fields(cls, leave_out=events.Base.__struct_fields__)
    yield "### A delta\n"
    yield f"{said(events.Delta)}\n"
    yield from fields(events.Delta)


def _types() -> Iterator[str]:
    yield "## Types\n"
    for cls in sorted(_types_apart(), key=lambda cls: cls.__name__):
        yield f"### {cls.__name__}\n"
        yield f"{said(cls)}\n"
        tag = cls.__struct_config__.tag
        if tag is not None:
            yield f"`{cls.__struct_config__.tag_field}` is `{tag}`.\n"
        yield from fields(cls)


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "`error.code` is the coarse class, `error.data.kind` the exact identity;"
    yield "`error.data.retryable` says whether the very same call may succeed later.\n"
    codes = [cls.code for cls in errors()]
    yield from table(
        "code | kind | retryable | meaning",
        *(
            (str(cls.code), f"`{cls.kind}`", "yes" if cls.retryable else "no", said(cls))
            for cls in sorted(errors(), key=lambda cls: codes.index(cls.code))  # in the order of the tree
        ),
    )


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
