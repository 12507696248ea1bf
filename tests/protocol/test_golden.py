"""What crosses the wire, byte for byte: one line per message in `golden/`.

A change of these files is a change of the protocol. When it is meant, write them anew with

    python tests/protocol/test_golden.py

and look at the difference.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent_sdk.protocol import events
from agent_sdk.protocol.codec import Codec, Notification, Request, Response, decode_params
from agent_sdk.protocol.methods import NOTICES, all_methods
from agent_sdk.protocol.methods.method import result_type

sys.path[:0] = [] if __name__ != "__main__" else [str(Path(__file__).parents[2])]
from tests.protocol.examples import example  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


def lines(name: str) -> list[bytes]:
    return (GOLDEN / name).read_bytes().splitlines()


def calls() -> dict[str, tuple[bytes, bytes]]:
    """Method name to request and response."""
    both = lines("methods.jsonl")
    return {
        json.loads(call)["method"]: (call, answer) for call, answer in zip(both[::2], both[1::2], strict=True)
    }


def by_name(name: str, key: str) -> dict[str, bytes]:
    return {json.loads(line)[key]: line for line in lines(name)}


@pytest.mark.parametrize("name", all_methods())
def test_a_call_and_its_answer_look_like_this(name):
    method = all_methods()[name]
    call, answer = calls()[name]
    client, server = Codec(), Codec(strict=True)
    request = server.receive(call, text=True)
    assert isinstance(request, Request)
    params = decode_params(method, request.params)
    sent = msgspec.json.decode(client.request(name, params)[1]) | {"id": name}
    assert msgspec.json.encode(sent) == call
    result = msgspec.json.decode(answer_in(answer), type=result_type(method))
    assert server.response(name, result) == answer


def answer_in(line: bytes) -> bytes:
    client = Codec()
    id, _ = client.request("ping", {})
    response = client.receive(msgspec.json.encode(msgspec.json.decode(line) | {"id": id}), text=True)
    assert isinstance(response, Response)
    return bytes(response.result)


@pytest.mark.parametrize("notice", NOTICES, ids=lambda notice: notice.method)
def test_a_notice_looks_like_this(notice):
    line = by_name("notices.jsonl", "method")[notice.method]
    message = Codec(strict=True).receive(line, text=True)
    assert isinstance(message, Notification)
    assert Codec().notification(notice.method, decode_params(notice, message.params)) == line


@pytest.mark.parametrize("kind", events.kinds())
def test_an_event_looks_like_this(kind):
    line = by_name("events.jsonl", "type")[kind]
    event = events.decode(line)
    assert type(event) is events.kinds()[kind]
    assert events.encode(event) == line
    assert event.to_json() == line.decode()


def test_the_golden_files_hold_nothing_else():
    assert set(calls()) == set(all_methods())
    assert set(by_name("notices.jsonl", "method")) == {notice.method for notice in NOTICES}
    assert set(by_name("events.jsonl", "type")) == set(events.kinds())


def test_every_field_has_an_example():
    for name, method in all_methods().items():
        assert set(json.loads(calls()[name][0])["params"]) == set(method.__struct_fields__)


def _fresh() -> Iterator[tuple[str, list[bytes]]]:
    methods = []
    for name, method in all_methods().items():
        call = msgspec.json.decode(Codec().request(name, example(method))[1]) | {"id": name}
        result = example(msgspec.inspect.type_info(result_type(method)))
        methods += [msgspec.json.encode(call), Codec().response(name, result)]
    yield "methods.jsonl", methods
    yield "notices.jsonl", [Codec().notification(notice.method, example(notice)) for notice in NOTICES]
    yield "events.jsonl", [events.encode(example(kind)) for kind in events.kinds().values()]


if __name__ == "__main__":
    for name, fresh in _fresh():
        (GOLDEN / name).write_bytes(b"".join(line + b"\n" for line in fresh))
