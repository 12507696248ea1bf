"""Whatever comes in: a message or a typed error. Whatever goes out comes in again."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_sdk.protocol import events, frame
from agent_sdk.protocol.codec import (
    MESSAGES,
    Codec,
    Failure,
    Notification,
    Request,
    Response,
    decode_params,
)
from agent_sdk.protocol.errors import (
    AgentServerError,
    BadBinaryHeader,
    ErrorObject,
    InvalidRequest,
    ParseError,
)
from agent_sdk.protocol.methods import NOTICES, all_methods
from agent_sdk.protocol.methods.method import result_type
from tests.protocol.examples import JSON, values

METHODS = all_methods()
MEMBERS = ("jsonrpc", "id", "method", "params", "result", "error", "else")

ids = st.one_of(
    st.text(max_size=130),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.sampled_from([1, "1", 2**53]),
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.sampled_from(["2.0", "1.0", 2.0, None]),
        "id": ids | JSON,
        "method": st.sampled_from([*METHODS, "events", "$/cancelRequest", "", "nobody"]) | JSON,
        "params": JSON,
        "result": JSON,
        "error": JSON
        | st.fixed_dictionaries({"code": st.integers()}, optional={"message": JSON, "data": JSON}),
        "else": JSON,
    },
).map(
    lambda envelope: json.dumps(envelope, allow_nan=True, ensure_ascii=False).encode(errors="surrogatepass")
)
junk = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=300).map(str.encode),
    envelopes,
    st.tuples(envelopes, st.integers(0, 300), st.binary(max_size=3)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
    ),
    st.builds(
        bytes.__mul__, st.sampled_from([b"[", b'{"a":', b'{"params":[', b'"\\u']), st.integers(0, 3000)
    ),
)
headers = st.tuples(
    st.integers(0, 3), st.integers(0, 6), st.integers(0, 3), st.integers(0, 9), st.integers(0, 2**64 - 1)
).map(lambda fields: frame._head.pack(*fields))


@given(text=junk, strict=st.booleans())
def test_any_text_is_a_message_or_a_typed_error(text, strict):
    codec = Codec(strict=strict)
    codec.request("ping", {})
    try:
        message = codec.receive(text, text=True)
    except (ParseError, InvalidRequest, AgentServerError) as refused:
        answer = json.loads(codec.refusal(refused))
        assert answer["error"]["code"] == refused.code
    else:
        assert message is None or isinstance(message, Request | Notification | Response | Failure)


@given(
    frames=st.lists(
        st.tuples(headers, st.binary(max_size=300)).map(b"".join) | st.binary(max_size=30), max_size=5
    )
)
def test_any_binary_frame_means_something_or_is_refused(frames):
    codec = Codec(strict=True)
    for content in frames:
        try:
            codec.receive(content, text=False)
        except AgentServerError as refused:
            assert refused.code is not None


@given(raw=junk)
def test_any_bytes_are_an_event_or_refused(raw):
    try:
        event = events.decode(raw)
    except InvalidRequest:
        return
    assert events.decode(events.encode(event)) == event or isinstance(event, events.Unknown)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_call_and_any_result_arrive_as_they_were(name, data):
    method = METHODS[name]
    params = data.draw(values(method))
    client, server = Codec(), Codec(strict=True)
    request = server.receive(client.request(name, params)[1], text=True)
    assert isinstance(request, Request)
    assert same(decode_params(method, request.params), params)
    result = data.draw(values(msgspec.inspect.type_info(result_type(method))))
    response = client.receive(server.response(request.id, result), text=True)
    assert isinstance(response, Response)
    assert same(msgspec.json.decode(response.result, type=result_type(method)), result)


@pytest.mark.parametrize("notice", NOTICES, ids=lambda notice: notice.method)
@settings(max_examples=25)
@given(data=st.data())
def test_any_notice_arrives_as_it_was(notice, data):
    sent = data.draw(values(notice))
    message = Codec(strict=True).receive(Codec().notification(notice.method, sent), text=True)
    assert isinstance(message, Notification)
    assert same(decode_params(notice, message.params), sent)


@pytest.mark.parametrize("kind", events.kinds())
@settings(max_examples=25)
@given(data=st.data())
def test_any_event_arrives_as_it_was(kind, data):
    event = data.draw(values(events.kinds()[kind]))
    assert same(events.decode(events.encode(event)), event)


@given(
    text=st.text(max_size=100),
    code=st.integers(-(2**31), 2**31),
    data=st.dictionaries(st.text(), JSON, max_size=3),
)
def test_any_error_arrives_as_it_was(text, code, data):
    client, server = Codec(), Codec()
    id, call = client.request("ping", {})
    server.receive(call, text=True)
    answer = client.receive(server.failure(id, ErrorObject(code, text, data)), text=True)
    assert isinstance(answer, Failure)
    assert (answer.error.code, answer.error.message, answer.error.data) == (code, text, data)


@given(text=st.text(min_size=1, max_size=500), cuts=st.lists(st.integers(1, 200), max_size=20))
def test_a_message_cut_anywhere_arrives_whole(text, cuts):
    client, server = Codec(), Codec(strict=True)
    message = client.request("send_message", {"text": text})[1]
    places = sorted({cut for cut in cuts if cut < len(message)} | {0, len(message)})
    got = None
    for start, end in zip(places, places[1:], strict=False):
        last = end == len(message)
        assert got is None
        got = server.receive(frame.piece(MESSAGES, start, message[start:end], last=last), text=False)
    assert isinstance(got, Request)
    assert msgspec.json.decode(got.params) == {"text": text}


@given(
    stream=st.integers(1, 2**32 - 1),
    offset=st.integers(0, 2**64 - 1),
    payload=st.binary(min_size=1, max_size=256),
)
def test_any_binary_frame_says_what_was_put_in(stream, offset, payload):
    assert frame.unpack(frame.data(stream, offset, payload)) == frame.Data(stream, offset, payload)
    assert frame.unpack(frame.end(stream, offset, payload)) == frame.End(stream, offset, payload)
    assert frame.unpack(frame.credit(stream, offset)) == frame.Credit(stream, offset)
    for last in (True, False):
        piece = frame.unpack(frame.piece(stream, offset, payload, last=last))
        assert isinstance(piece, frame.Piece)
        assert (piece.stream, piece.offset, bytes(piece.payload), piece.last) == (
            stream,
            offset,
            payload,
            last,
        )


@given(reason=st.text(max_size=400))
def test_any_reason_of_a_reset_is_carried_or_cut(reason):
    reset = frame.unpack(frame.reset(3, reason))
    assert isinstance(reset, frame.Reset)
    assert reason.startswith(reset.reason.rstrip("�")) or "�" in reason


@given(content=st.binary(max_size=80))
def test_any_bytes_are_a_binary_frame_or_refused_as_one(content):
    try:
        frame.unpack(content)
    except BadBinaryHeader as refused:
        assert str(refused)


def same(one: object, other: object) -> bool:
    """Equal as JSON: Raw values have no equality of their own."""
    return msgspec.json.encode(one) == msgspec.json.encode(other)
