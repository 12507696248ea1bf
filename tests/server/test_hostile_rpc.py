"""Hostile JSON-RPC on an initialised connection: what is sent, and the error that answers it."""

from __future__ import annotations

import pytest

from agent_sdk.ids import new_id
from tests.server.wire import TEXT, call, frame

OP = "01900000-0000-7000-8000-000000000001"
PARSE, REQUEST, METHOD, PARAMS, CONFLICT = -32700, -32600, -32601, -32602, -32005


def nested(depth: int) -> bytes:
    return b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":' + b"[" * depth + b"]" * depth + b"}}"


def raw(id: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","id":' + id + b',"method":"ping"}'


def method(name: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","id":1,"method":' + name + b"}"


def params(value: bytes, of: bytes = b"conversation.events") -> bytes:
    return b'{"jsonrpc":"2.0","id":1,"method":"' + of + b'","params":' + value + b"}"


def message(**more) -> dict:
    return {"op_id": OP, "text": "hello", **more}


REFUSED: dict[str, tuple[bytes, int, str, str]] = {
    "17 empty": (b"", PARSE, "parse_error", "byte 0"),
    "17 half": (b"{", PARSE, "parse_error", "byte 1"),
    "17 two values": (b"{}{}", PARSE, "parse_error", "byte"),
    "17 byte order mark": ("\ufeff{}".encode(), PARSE, "parse_error", "byte 0"),
    "17 single quotes": (b"{'jsonrpc':'2.0'}", PARSE, "parse_error", "byte 1"),
    "17 NaN": (raw(b"NaN"), PARSE, "parse_error", "byte"),
    "17 01": (raw(b"01"), PARSE, "parse_error", "byte"),
    "17 minus": (raw(b"-"), PARSE, "parse_error", "byte"),
    "18 depth 100 000": (nested(100_000), PARSE, "max_depth", "max_depth 64"),
    "18 depth 500": (nested(500), PARSE, "max_depth", "max_depth 64"),
    "18 depth 65": (nested(63), PARSE, "max_depth", "max_depth 64"),
    "18 an array of 100 000 arrays": (b"[" * 100_000, PARSE, "max_depth", "max_depth 64"),
    "19 5 000 digits": (
        params(b'{"after":' + b"9" * 5000 + b"}"),
        PARAMS,
        "invalid_params",
        "$.params.after",
    ),
    "19 1e999": (params(b'{"after":1e999}'), PARAMS, "invalid_params", "$.params.after"),
    "19 id of 4 000 digits": (raw(b"9" * 4000), REQUEST, "bad_id", "2**53"),
    "20 no version": (b'{"id":1,"method":"ping"}', REQUEST, "invalid_request", "jsonrpc"),
    "20 version 1.0": (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', REQUEST, "invalid_request", "jsonrpc"),
    "20 version is a number": (
        b'{"jsonrpc":2.0,"id":1,"method":"ping"}',
        REQUEST,
        "invalid_request",
        "jsonrpc",
    ),
    "21 id true": (raw(b"true"), REQUEST, "bad_id", "id"),
    "21 id null": (raw(b"null"), REQUEST, "bad_id", "id"),
    "21 id 1.5": (raw(b"1.5"), REQUEST, "bad_id", "id"),
    "21 id object": (raw(b"{}"), REQUEST, "bad_id", "id"),
    "21 id array": (raw(b"[]"), REQUEST, "bad_id", "id"),
    "21 id of 300 characters": (raw(b'"' + b"x" * 300 + b'"'), REQUEST, "bad_id", "id"),
    "21 id empty": (raw(b'""'), REQUEST, "bad_id", "id"),
    "22 method twice": (
        b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"conversation.delete"}',
        REQUEST,
        "duplicate_key",
        "twice",
    ),
    "22 id twice": (b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}', REQUEST, "duplicate_key", "twice"),
    "23 batch": (b"[" + call("ping") + b"]", REQUEST, "batch_not_supported", "batches are not supported"),
    "23 empty batch": (b"[]", REQUEST, "batch_not_supported", "batches are not supported"),
    "23 batch of a number": (b"[1]", REQUEST, "batch_not_supported", "batches are not supported"),
    "23 batch of 10 000": (
        b"[" + b",".join([call("ping")] * 10_000) + b"]",
        REQUEST,
        "batch_not_supported",
        "batches are not supported",
    ),
    "24 method is a number": (method(b"5"), METHOD, "method_not_found", "5"),
    "24 method is empty": (method(b'""'), METHOD, "method_not_found", "no method"),
    "24 method of 10 KB": (method(b'"' + b"x" * 10_240 + b'"'), METHOD, "method_not_found", "x" * 64),
    "24 dunder": (method(b'"__init__"'), METHOD, "method_not_found", "__init__"),
    "24 rpc.x": (method(b'"rpc.x"'), METHOD, "method_not_found", "rpc.x"),
    "24 capital": (method(b'"Execute"'), METHOD, "method_not_found", "Execute"),
    "24 NUL": (method(b'"ping\\u0000"'), METHOD, "method_not_found", "ping\\x00"),
    "24 a method for clients": (method(b'"tool.call"'), METHOD, "method_not_found", "tool.call"),
    "25 list": (params(b"[]"), PARAMS, "invalid_params", "$.params: expected"),
    "25 unknown field": (params(b'{"afer":1}'), PARAMS, "invalid_params", "afer"),
    "25 wrong type": (params(b'{"after":"1"}'), PARAMS, "invalid_params", "$.params.after: expected int"),
    "25 missing": (params(b"{}", b"send_message"), PARAMS, "invalid_params", "op_id"),
    "25 list of 100 000": (
        params(b'{"op_id":"' + OP.encode() + b'","argv":[' + b'"x",' * 99_999 + b'"x"]}', b"execute"),
        PARAMS,
        "invalid_params",
        "$.params.argv",
    ),
    "25 lone surrogate": (
        params(b'{"op_id":"' + OP.encode() + b'","text":"\\ud800"}', b"send_message"),
        PARAMS,
        "invalid_params",
        "$.params: a lone surrogate is no text",
    ),
    "26 neither call nor answer": (b'{"jsonrpc":"2.0"}', REQUEST, "invalid_request", "neither"),
    "26 both call and answer": (
        b'{"jsonrpc":"2.0","id":1,"method":"ping","result":1}',
        REQUEST,
        "invalid_request",
        "both",
    ),
    "27 no op_id": (call("send_message", text="x"), PARAMS, "invalid_params", "op_id"),
    "27 op_id of 1 MB": (
        call("send_message", op_id="x" * 1_000_000, text="x"),
        PARAMS,
        "invalid_params",
        "op_id",
    ),
    "27 op_id is no UUID": (call("send_message", op_id="1", text="x"), PARAMS, "invalid_params", "op_id"),
    "29 seq -1": (call("events.subscribe", after_seq=-1), PARAMS, "invalid_params", "$.params.after_seq"),
    "29 seq 2**64": (
        call("events.subscribe", after_seq=2**64 - 1),
        PARAMS,
        "invalid_params",
        "$.params.after_seq",
    ),
    "08 initialize twice": (
        call("initialize", protocol_version=1, client={"name": "x", "version": "1"}),
        REQUEST,
        "invalid_request",
        "initialize came already",
    ),
}


@pytest.mark.parametrize(("data", "code", "kind", "words"), REFUSED.values(), ids=REFUSED)
async def test_a_hostile_message_gets_its_error_and_the_connection_goes_on(server, data, code, kind, words):
    async with server.session() as wire:
        await wire.send(frame(TEXT, data))
        error = (await wire.message())["error"]
        assert (error["code"], error["data"]["kind"]) == (code, kind)
        assert words in error["message"]
        assert len(error["message"]) < 500
        assert (await wire.call("ping", 99))["result"] == {}


IGNORED = {
    "26 a notification that changes something": b'{"jsonrpc":"2.0","method":"conversation.delete","params":{}}',
    "26 an answer to nothing": b'{"jsonrpc":"2.0","id":77,"result":{}}',
    "26 an error without a code": b'{"jsonrpc":"2.0","id":77,"error":{"message":"x"}}',
    "26 an unknown notification": b'{"jsonrpc":"2.0","method":"hello"}',
    "26 a cancel of nothing": b'{"jsonrpc":"2.0","method":"$/cancelRequest","params":{"id":"nobody"}}',
}


@pytest.mark.parametrize("data", IGNORED.values(), ids=IGNORED)
async def test_what_cannot_be_answered_is_ignored(server, data):
    async with server.session() as wire:
        await wire.send(frame(TEXT, data))
        assert (await wire.call("ping", 99))["result"] == {}
        state = (await wire.call("conversation.state", 100))["result"]
        assert state["id"] == wire.answered["conversation"]


async def test_depth_64_is_fine(server):
    async with server.session() as wire:
        await wire.send(frame(TEXT, nested(62)))
        assert (await wire.message())["error"]["data"]["kind"] == "invalid_params"


async def test_an_id_may_be_used_again_after_its_answer(server):
    async with server.session() as wire:
        assert [(await wire.call("ping", 5))["id"] for _ in range(3)] == [5, 5, 5]


async def test_an_id_that_is_in_flight_is_refused(server):
    async with server.session() as wire:
        hanging = call("execute", 5, op_id=new_id(), argv=["sleep", "600"], timeout_ms=600_000)
        await wire.send(frame(TEXT, hanging) + frame(TEXT, hanging))
        assert (await wire.message())["error"]["data"]["kind"] == "bad_id"
        await wire.send_json({"jsonrpc": "2.0", "id": 6, "method": "call.cancel", "params": {"id": 5}})
        answers = {answer["id"]: answer for answer in [await wire.message(), await wire.message()]}
        assert answers[5]["error"]["code"] == -32800
        assert answers[6]["result"]["outcome"] == "cancelled"


async def test_an_op_id_with_other_params_is_refused(server):
    async with server.session() as wire:
        await wire.call("set_title", 1, op_id=OP, title="one")
        error = (await wire.call("set_title", 2, op_id=OP, title="two"))["error"]
        assert (error["code"], error["data"]["kind"]) == (CONFLICT, "op_mismatch")


async def test_an_op_id_that_comes_again_runs_once(server):
    async with server.session() as first:
        id = first.answered["conversation"]
        async with server.session(f"/v1/conversations/{id}") as second:
            given = {"op_id": OP, "shell": "echo x >> runs; sleep 0.2; cat runs"}
            await first.send(frame(TEXT, call("execute", 1, **given)))
            await second.send(frame(TEXT, call("execute", 1, **given)))
            texts = [(await wire.message())["result"]["stdout_text"] for wire in (first, second)]
            assert texts == ["x\n", "x\n"]


async def test_the_65th_call_in_flight_has_to_wait(server):
    async with server.session() as wire:
        for number in range(65):
            await wire.send(
                frame(TEXT, call("process.wait", number, process_id="x") if number > 63 else hanging(number))
            )
        error = (await wire.message())["error"]
        assert (error["code"], error["data"]["kind"]) == (-32001, "overloaded")
        assert error["data"]["retry_after_ms"] > 0


def hanging(number: int) -> bytes:
    return call("execute", number, op_id=new_id(), argv=["sleep", "600"], timeout_ms=600_000)


@pytest.mark.parametrize(
    ("resume", "reason"),
    [
        ({"epoch": None, "after_seq": 99}, "ends at 1"),
        ({"epoch": "another", "after_seq": 1}, "made anew"),
        ({"epoch": "another", "after_seq": 0}, "made anew"),
    ],
    ids=["29 future seq", "29 other epoch", "29 other epoch, seq 0"],
)
async def test_a_cursor_that_means_nothing_here_begins_with_a_reset(server, resume, reason):
    async with server.session() as wire:
        id = wire.answered["conversation"]
    async with server.session(f"/v1/conversations/{id}", resume=resume) as wire:
        reset = await wire.message()
        assert reset["method"] == "sync.reset"
        assert reason in reset["params"]["reason"]
        assert (await wire.message())["params"]["events"][0]["seq"] == 1


@pytest.mark.parametrize("resume", [{"after_seq": -1}, {"after_seq": 2**64 - 1}], ids=["29 -1", "29 2**64"])
async def test_a_cursor_that_is_no_number_is_refused(server, resume):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        error = (await wire.initialize(resume=resume))["error"]
        assert error["code"] == PARAMS
        assert "$.params.resume.after_seq" in error["message"]


async def test_a_client_of_a_later_version_is_let_in_with_what_both_know(server):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        answer = await wire.initialize(of_a_later_version={"a": 1})
        assert answer["result"]["server"]["name"] == "agent-server"
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        error = (await wire.initialize(protocol_version=2))["error"]
        assert "this server (agent-server" in error["message"]
        assert "the server is the older one" in error["message"]
        assert error["data"]["supported"] == [1]
