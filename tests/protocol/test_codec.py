"""What one end of a conversation makes of what comes in. No event loop, no socket."""

import json

import pytest
from msgspec import Raw

from agent_sdk.protocol import frame
from agent_sdk.protocol.codec import (
    EVENTS,
    MESSAGES,
    Codec,
    Failure,
    Notification,
    Request,
    Response,
    decode_params,
    unknown_method,
)
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
)
from agent_sdk.protocol.methods.connection import Initialize
from agent_sdk.protocol.methods.workspace import Describe, Execute, ProcessSignal, Upload
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import Limits

OP_ID = "018f0000-0000-7000-8000-000000000001"


def call(**members):
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"} | members).encode()


def refused(text, *, strict=True):
    """The error, and what is answered."""
    codec = Codec(strict=strict)
    with pytest.raises(AgentServerError) as caught:
        codec.receive(text, text=True)
    return caught.value, json.loads(codec.refusal(caught.value))


def nested(depth):
    return call(params=None).replace(b"null", b'{"a":' + b"[" * (depth - 2) + b"]" * (depth - 2) + b"}")


def test_a_call_arrives_as_it_was_sent():
    client, server = Codec(), Codec(strict=True)
    id, text = client.request("execute", Execute(op_id=OP_ID, shell="ls"))
    request = server.receive(text, text=True)
    assert isinstance(request, Request)
    assert (request.id, request.method) == (id, "execute")
    assert decode_params(Execute, request.params) == Execute(op_id=OP_ID, shell="ls")


def test_two_calls_may_be_answered_in_any_order():
    client, server = Codec(), Codec()
    for _ in range(2):
        server.receive(client.request("ping", {})[1], text=True)
    second = client.receive(server.response(2, {}), text=True)
    first = client.receive(server.failure(1, ErrorObject(-32004, "gone")), text=True)
    assert isinstance(second, Response) and second.id == 2
    assert first == Failure(1, ErrorObject(-32004, "gone"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"", "byte 0"),
        (b"{", "byte 1"),
        (b'{"jsonrpc":"2.0"} {}', "byte 1"),
        (b"\xef\xbb\xbf{}", "byte 0"),
        (b"{'jsonrpc':'2.0'}", "byte 1"),
        (b'{"id":NaN}', "byte 6"),
        (b'{"id":01}', "byte 7"),
        (b'{"id":-}', "byte 7"),
        (b'{"id":1,}', "byte 8"),
        (b'{"method":"\xff"}', "byte 11"),
        (b'{"method":"\xed\xa0\x80"}', "byte 11"),
        (b'{"method":"\xc0\xaf"}', "byte 11"),
        (b'{"method":"\\ud800 and much more text"}', "byte"),
        (b"\x00", "byte 0"),
    ],
)
def test_what_is_not_json_is_a_parse_error_with_the_place(text, place):
    error, answer = refused(text)
    assert type(error) is ParseError
    assert place in str(error)
    assert (answer["id"], answer["error"]["code"]) == (None, -32700)


@pytest.mark.parametrize(
    "text", [nested(65), nested(500), nested(100_000), b"[" * 100_000, b'{"a":' * 100_000]
)
def test_deep_json_is_refused_before_it_is_read(text):
    error, answer = refused(text)
    assert type(error) is MaxDepth
    assert answer["error"] == {
        "code": -32700,
        "message": "max_depth 64",
        "data": {"limit": 64, "kind": "max_depth", "retryable": False},
    }


def test_json_of_the_greatest_depth_is_read():
    assert isinstance(Codec(strict=True).receive(nested(64), text=True), Request)


def test_the_trusting_side_survives_deep_json_too():
    assert type(refused(nested(100_000), strict=False)[0]) is MaxDepth
    assert isinstance(Codec().receive(nested(65), text=True), Request)


@pytest.mark.parametrize(
    "text", [b"[]", b"[1]", b" [ ]", b"[" + call() + b"]", b"[" + b",".join([call()] * 10_000) + b"]"]
)
def test_batches_are_refused_and_nothing_of_them_runs(text):
    error, answer = refused(text, strict=False)
    assert type(error) is BatchNotSupported
    assert (answer["id"], answer["error"]["message"]) == (None, "batches are not supported")


@pytest.mark.parametrize("text", [b"1", b'"ping"', b"null", b"true"])
def test_json_that_is_no_object_is_no_message(text):
    error, answer = refused(text)
    assert type(error) is InvalidRequest
    assert (answer["id"], answer["error"]["code"]) == (None, -32600)


@pytest.mark.parametrize("version", ["1.0", 2.0, None, "2.0 "])
def test_another_version_of_json_rpc_is_refused_under_its_id(version):
    error, answer = refused(call(jsonrpc=version))
    assert type(error) is InvalidRequest
    assert (answer["id"], answer["error"]["code"]) == (1, -32600)


def test_a_missing_version_is_refused():
    assert type(refused(b'{"id":1,"method":"ping"}')[0]) is InvalidRequest


@pytest.mark.parametrize("id", ["", "x" * 129, True, 1.5, 1.0, {}, [], None, 2**53 + 1, -(2**53) - 1])
def test_an_id_that_is_none_is_refused_under_null(id):
    error, answer = refused(call(id=id))
    assert type(error) is BadId
    assert (answer["id"], answer["error"]["data"]["kind"]) == (None, "bad_id")


@pytest.mark.parametrize("id", [b"9" * 4000, b"1e999", b"1e3", b"-0.0"])
def test_a_number_that_is_no_integer_is_no_id(id):
    assert type(refused(call(id="?").replace(b'"?"', id))[0]) is BadId


@pytest.mark.parametrize("id", ["x", "x" * 128, "\u0000", "ä" * 128, 0, -1, 2**53, -(2**53)])
def test_an_id_comes_back_as_it_was(id):
    codec = Codec(strict=True)
    request = codec.receive(call(id=id), text=True)
    assert isinstance(request, Request)
    assert json.loads(codec.response(request.id, {}))["id"] == id


def test_a_refused_message_leaves_its_id_free():
    codec = Codec()
    with pytest.raises(InvalidRequest):
        codec.receive(call(jsonrpc="1.0"), text=True)
    assert isinstance(codec.receive(call(), text=True), Request)


@pytest.mark.parametrize(
    "text",
    [
        b'{"jsonrpc":"2.0","id":1,"method":"a","method":"b"}',
        b'{"jsonrpc":"2.0","id":1,"method":"a","m\\u0065thod":"b"}',
        b'{"jsonrpc":"2.0","id":1,"method":"a","params":{"id":[{}]},"params":{}}',
    ],
)
def test_a_member_that_occurs_twice_is_refused(text):
    error, answer = refused(text)
    assert type(error) is DuplicateKey
    assert (answer["id"], answer["error"]["data"]["kind"]) == (1, "duplicate_key")


def test_members_of_params_may_be_called_like_those_of_the_envelope():
    text = call(params={"id": 1, "method": "x", "params": [{"id": 2}], "text": '"id" \\u0069d {["'})
    assert isinstance(Codec(strict=True).receive(text, text=True), Request)


@pytest.mark.parametrize("method", [1, None, [], {}, True, 1.5])
def test_a_method_that_is_no_name_does_not_exist(method):
    error, answer = refused(call(method=method))
    assert type(error) is MethodNotFound
    assert (answer["id"], answer["error"]["code"]) == (1, -32601)


def test_the_name_of_an_unknown_method_is_escaped_and_cut():
    assert unknown_method("\x00\nrm\u202e").details == {"method": "\\x00\\nrm\\u202e"}
    assert unknown_method("x" * 10_000).details == {"method": "x" * 64}
    assert len(unknown_method("\x00" * 10_000).details["method"]) == 64


def test_a_message_that_calls_and_answers_is_refused():
    assert type(refused(call(result={}))[0]) is InvalidRequest
    assert type(refused(b'{"jsonrpc":"2.0","id":1}')[0]) is InvalidRequest


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"id": None, "result": 0}, "answer nobody awaits"),
        ({"result": 0}, "answer nobody awaits"),
        ({"id": True, "error": {"code": 1, "message": ""}}, "answer nobody awaits"),
        ({"id": 1, "error": {"message": "no code"}}, "illegible answer"),
        ({"id": 1, "error": {"code": "1", "message": ""}}, "illegible answer"),
        ({"id": 1, "error": "broken"}, "illegible answer"),
        ({"id": 1, "result": 0, "error": {"code": 1, "message": ""}}, "illegible answer"),
    ],
)
def test_an_answer_that_makes_no_sense_is_ignored_and_counted(answer, reason):
    codec = Codec()
    codec.request("ping", {})
    assert codec.receive(json.dumps({"jsonrpc": "2.0"} | answer).encode(), text=True) is None
    assert codec.ignored == {reason: 1}


def test_the_data_of_a_foreign_error_may_be_anything():
    codec = Codec()
    codec.request("ping", {})
    answer = b'{"jsonrpc":"2.0","id":1,"error":{"code":-1,"message":"no","data":["x"]}}'
    assert codec.receive(answer, text=True) == Failure(1, ErrorObject(-1, "no"))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("execute", "call without id"),
        ("upload", "call without id"),
        ("nobody", "unknown notice"),
        (1, "unknown notice"),
    ],
)
def test_a_notification_that_is_no_notice_is_ignored_and_counted(method, reason):
    codec = Codec(strict=True)
    text = json.dumps({"jsonrpc": "2.0", "method": method, "params": {}}).encode()
    assert codec.receive(text, text=True) is None
    assert codec.ignored == {reason: 1}


def test_a_notice_needs_no_params_and_no_memory():
    message = Codec().receive(b'{"jsonrpc":"2.0","method":"draining"}', text=True)
    assert isinstance(message, Notification)
    assert bytes(message.params) == b"{}"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (b"[]", "$.params: expected object, got array"),
        (b"null", "$.params: expected object, got null"),
        (b"{}", "$.params: object missing required field op_id"),
        (b'{"op_id":"x"}', "$.params.op_id: expected str matching regex"),
        (b'{"op_id":"%b","timeout_ms":"10"}', "$.params.timeout_ms: expected int | null, got str"),
        (b'{"op_id":"%b","timeout_ms":0.9}', "$.params.timeout_ms: expected int | null, got float"),
        (b'{"op_id":"%b","timeout_ms":0}', "$.params.timeout_ms: expected int >= 1"),
        (b'{"op_id":"%b","timeout_ms":1e12}', "$.params.timeout_ms"),
        (b'{"op_id":"%b","timeout_ms":86400001}', "$.params.timeout_ms: expected int <= 86400000"),
        (b'{"op_id":"%b","argv":["a",1]}', "$.params.argv[1]: expected str, got int"),
        (b'{"op_id":"%b","argv":[]}', "$.params.argv: expected array of length >= 1"),
        (b'{"op_id":"%b","tmeout_ms":1}', "$.params: object contains unknown field tmeout_ms"),
        (b'{"op_id":"%b","env":{"A":1}}', "$.params.env[...]: expected str, got int"),
        (b'{"op_id":"%b","shell":"\\ud800 lone and long enough"}', "$.params: JSON is malformed"),
        (b'{"op_id":"%b","stdin":%c}', "$.params.stdin: "),
    ],
)
def test_params_that_do_not_fit_are_refused_with_their_place(params, message):
    raw = Raw(params.replace(b"%b", OP_ID.encode()).replace(b"%c", b"9" * 5000))
    with pytest.raises(InvalidParams) as caught:
        decode_params(Execute, raw)
    assert str(caught.value)[: len(message)].lower() == message.lower()


def test_a_long_or_strange_name_in_an_error_is_escaped_and_cut():
    with pytest.raises(InvalidParams) as caught:
        decode_params(Describe, Raw(json.dumps({"\x1b[31m" + "x" * 10_000: 1}).encode()))
    assert "\\x1b[31m" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_nul_in_text_is_let_through_to_whoever_knows_what_the_text_means():
    assert decode_params(Execute, Raw(b'{"op_id":"%b","shell":"a\\u0000b"}' % OP_ID.encode())).shell == "a\0b"


@pytest.mark.parametrize("shell", ["\ud800", "\udc00 and text", "\\\ud8ff", "😀\ud800😀"])
def test_a_lone_surrogate_in_a_call_is_blamed_on_the_params(shell):
    error, answer = refused(call(method="execute", params={"shell": shell}))
    assert type(error) is InvalidParams
    assert answer["id"] == 1


def test_an_escaped_backslash_before_a_u_is_no_surrogate():
    text = call(method="execute", params={"shell": "\\ud800"})
    assert isinstance(Codec(strict=True).receive(text, text=True), Request)


def test_params_that_json_cannot_say_are_refused_before_they_are_sent():
    codec = Codec()
    with pytest.raises(InvalidParams, match=r"\$\.params\.shell: contains a lone surrogate"):
        codec.request("execute", Execute(op_id=OP_ID, shell="\ud800"))


def test_params_that_no_parser_can_follow_are_refused():
    with pytest.raises(InvalidParams, match="nested too deeply"):
        decode_params(Initialize, Raw(b'{"capabilities":{"a":%b' % (b"[" * 100_000)))
    with pytest.raises(InvalidParams, match="not UTF-8"):
        decode_params(Execute, Raw(b'{"op_id":"\xff"}'))


def test_a_result_of_a_newer_version_is_understood():
    codec = Codec()
    codec.request("workspace.describe", {})
    known = {"root": "/", "working_dir": "/", "platform": "linux", "python": "3", "confined": True}
    answer = {"jsonrpc": "2.0", "id": 1, "result": known | {"new": 1}}
    response = codec.receive(json.dumps(answer).encode(), text=True)
    assert isinstance(response, Response)
    assert json.loads(bytes(response.result))["new"] == 1
    assert WorkspaceInfo(**known).root == "/"


@pytest.mark.parametrize(
    ("name", "fits"), [("INT", True), ("FOO", True), ("int", False), ("9", False), ("", False)]
)
def test_a_signal_is_named_in_capitals(name, fits):
    raw = Raw(json.dumps({"op_id": OP_ID, "process_id": "p", "name": name}).encode())
    if fits:
        assert decode_params(ProcessSignal, raw).name == name
    else:
        with pytest.raises(InvalidParams):
            decode_params(ProcessSignal, raw)


@pytest.mark.parametrize("channel", [0, -1, 2**32])
def test_an_upload_needs_a_channel(channel):
    raw = Raw(json.dumps({"op_id": OP_ID, "path": "x", "channel": channel}).encode())
    with pytest.raises(InvalidParams, match=r"\$\.params\.channel"):
        decode_params(Upload, raw)


def pieces(message, stream=MESSAGES, size=1000):
    starts = range(0, len(message), size)
    return [
        frame.piece(stream, start, message[start : start + size], last=start + size >= len(message))
        for start in starts
    ]


def test_a_long_message_arrives_with_its_last_piece():
    codec = Codec(strict=True)
    *first, last = pieces(call(params={"text": "ä" * 5000}))
    assert [codec.receive(piece, text=False) for piece in first] == [None] * len(first)
    assert isinstance(codec.receive(last, text=False), Request)


def test_pieces_of_events_and_of_other_messages_may_mix():
    codec = Codec()
    call_pieces = pieces(call(params={"text": "x" * 2000}))
    event_pieces = pieces(
        b'{"jsonrpc":"2.0","method":"events","params":{"text":"%b"}}' % (b"y" * 2000), EVENTS
    )
    got = [codec.receive(p, text=False) for both in zip(call_pieces, event_pieces, strict=True) for p in both]
    assert [type(message) for message in got[-2:]] == [Request, Notification]


def test_a_long_message_that_is_refused_does_not_end_the_connection():
    codec = Codec(strict=True)
    with pytest.raises(ParseError):
        codec.receive(frame.piece(MESSAGES, 0, b"{", last=True), text=False)
    assert isinstance(codec.receive(call(), text=True), Request)


@pytest.mark.parametrize(("stream", "offset"), [(2, 0), (MESSAGES, 1), (EVENTS, 2**64 - 1)])
def test_a_piece_out_of_place_ends_the_connection(stream, offset):
    with pytest.raises(BadBinaryHeader):
        Codec().receive(frame.piece(stream, offset, b"{", last=False), text=False)


def test_a_message_longer_than_the_limit_ends_the_connection():
    codec = Codec(Limits(message_bytes=2500))
    for start in (0, 1000):
        codec.receive(frame.piece(MESSAGES, start, b"x" * 1000, last=False), text=False)
    with pytest.raises(LimitExceeded) as caught:
        codec.receive(frame.piece(MESSAGES, 2000, b"x" * 501, last=False), text=False)
    assert caught.value.details == {"field": "message", "limit": 2500, "got": 2501}
