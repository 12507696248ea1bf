"""The client against servers that misbehave, over real sockets."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent_sdk.agent.llm.contract import Completion, ModelClient, ModelRequest, UserTurn
from agent_sdk.agent.llm.open import open_model
from agent_sdk.protocol.errors import (
    ModelAnswerBroken,
    ModelError,
    ModelRefused,
    ModelUnavailable,
)
from agent_sdk.protocol.specs import LLM

KEY = "sk-0123456789abcdef"
HELLO = ModelRequest(system="Help.", turns=[UserTurn("hi")])
STREAM = {"Content-Type": "text/event-stream"}
JSON = {"Content-Type": "application/json"}

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[..., Awaitable[TestServer]]
Ask = Callable[..., Awaitable[Completion]]


@pytest.fixture(params=["openai", "anthropic"])
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


def events(dialect: str, text: str) -> bytes:
    """A stream that says the text, one character per event."""
    if dialect == "openai":
        said = [{"choices": [{"delta": {"content": char}}]} for char in text]
        parts = [*said, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        lines = [f"data: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts]
        return "".join([*lines, "data: [DONE]\n\n"]).encode()
    said = [{"type": "content_block_delta", "index": 0, "delta": {"text": char}} for char in text]
    ending = [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"}]
    parts = [{"type": "message_start", "message": {}}, *said, *ending]
    return "".join(
        f"event: {part['type']}\ndata: {json.dumps(part, ensure_ascii=False)}\n\n" for part in parts
    ).encode()


def sending(pieces: Iterable[bytes], headers: dict[str, str], *, cut: bool = False) -> Respond:
    """A handler that sends these pieces, each when the one before has left, and may then drop the line."""

    async def respond(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if cut:
            request.transport.abort()
        return response

    return respond


@pytest.fixture
async def ask(dialect: str) -> AsyncIterator[Ask]:
    """Serve with this handler, ask once, and close everything."""
    closing: list[Callable[[], Awaitable[None]]] = []

    async def ask(respond: Respond, **options: object) -> Completion:
        app = web.Application()
        app.router.add_post("/v1/{tail:.*}", respond)
        server = TestServer(app)
        await server.start_server()
        closing.append(server.close)
        client = open_model(
            LLM(model=f"{dialect}/m", api_key=KEY, base_url=str(server.make_url("/v1")), **options)
        )
        closing.append(client.close)
        async with asyncio.timeout(30):
            return await client.complete(HELLO)

    yield ask
    for close in reversed(closing):
        await close()


async def test_characters_cut_between_pieces_arrive_whole(ask: Ask, dialect: str):
    text = "Grüße 🎉 漢字"
    stream = events(dialect, text)
    answer = await ask(sending([bytes([byte]) for byte in stream], STREAM))
    assert answer.text == text


async def test_a_stream_without_a_content_type_is_read(ask: Ask, dialect: str):
    assert (await ask(sending([events(dialect, "Hi")], {"Content-Type": "text/plain"}))).text == "Hi"


async def test_a_whole_answer_is_read_although_a_stream_was_asked_for(ask: Ask, dialect: str):
    bodies = {
        "openai": {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]},
        "anthropic": {"content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn"},
    }
    assert (await ask(sending([json.dumps(bodies[dialect]).encode()], JSON))).text == "Hi"


async def test_a_stream_is_read_although_a_whole_answer_was_asked_for(ask: Ask, dialect: str):
    assert (await ask(sending([events(dialect, "Hi")], STREAM), stream=False)).text == "Hi"


async def test_a_compressed_answer_is_read(ask: Ask, dialect: str):
    headers = {**STREAM, "Content-Encoding": "gzip"}
    assert (await ask(sending([gzip.compress(events(dialect, "Hi"))], headers))).text == "Hi"


async def test_what_follows_the_end_of_a_stream_is_ignored(ask: Ask, dialect: str):
    assert (await ask(sending([events(dialect, "Hi"), b"data: {{{\n\n"], STREAM))).text == "Hi"


async def test_a_stream_that_stays_open_after_its_end_does_not_hold_the_answer_back(ask: Ask, dialect: str):
    gone = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = await sending([events(dialect, "Hi")], STREAM)(request)
        await gone.wait()
        return response

    try:
        assert (await ask(respond)).text == "Hi"
    finally:
        gone.set()


async def failure(ask: Ask, respond: Respond, **options: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await ask(respond, **options)
    assert KEY not in str(caught.value) + str(caught.value.details)
    return caught.value


async def test_a_page_instead_of_an_answer_is_broken(ask: Ask):
    error = await failure(
        ask, sending([b"<html>Sign in</html>"], {"Content-Type": "text/html; charset=utf-8"})
    )
    assert type(error) is ModelAnswerBroken
    assert "base_url" in error.message


async def test_a_gateway_that_fails_with_a_page_is_unavailable(ask: Ask):
    async def respond(_: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="<html>Bad Gateway</html>", content_type="text/html")

    error = await failure(ask, respond)
    assert type(error) is ModelUnavailable
    assert "<" not in error.message


@pytest.mark.parametrize("kind", [STREAM, JSON], ids=["stream", "json"])
@pytest.mark.parametrize("body", [b"", b"{", b"null", b'{"choices": [', b"[" * 200_000, b"\xff\xff\n\n"])
async def test_an_empty_or_mangled_answer_is_broken(ask: Ask, kind: dict[str, str], body: bytes):
    assert type(await failure(ask, sending([body], kind))) is ModelAnswerBroken


async def test_an_error_with_status_200_is_an_error(ask: Ask):
    error = await failure(
        ask, sending([b'{"error": {"message": "out of cheese, ' + KEY.encode() + b'"}}'], JSON)
    )
    assert type(error) is ModelAnswerBroken
    assert "out of cheese" in error.message


async def test_a_line_dropped_in_mid_answer_is_a_broken_answer(ask: Ask, dialect: str):
    stream = events(dialect, "Hello there")
    error = await failure(ask, sending([stream[: len(stream) // 2]], STREAM, cut=True))
    assert type(error) is ModelAnswerBroken
    assert "middle" in error.message


async def test_a_stream_that_ends_too_early_is_a_broken_answer(ask: Ask, dialect: str):
    stream = events(dialect, "Hello there")
    assert type(await failure(ask, sending([stream[: len(stream) // 2]], STREAM))) is ModelAnswerBroken


async def test_a_line_dropped_before_the_answer_is_unavailability(ask: Ask):
    async def respond(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    assert type(await failure(ask, respond)) is ModelUnavailable


@pytest.mark.parametrize("begun", [False, True])
async def test_silence_is_unavailability(ask: Ask, dialect: str, begun: bool):
    over = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        if begun:
            await response.prepare(request)
            await response.write(events(dialect, "Hello")[:40])
        await over.wait()
        return response

    try:
        error = await failure(ask, respond, timeout=0.1)
    finally:
        over.set()
    assert type(error) is ModelUnavailable
    assert "silent" in error.message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_does_not_take_the_key_elsewhere(ask: Ask, status: int):
    visited: list[str] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        visited.append(request.path)
        return web.Response(status=status, headers={"Location": "/v1/elsewhere"})

    assert type(await failure(ask, respond)) is ModelRefused
    assert len(visited) == 1


async def test_an_endless_answer_is_given_up(ask: Ask):
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        while True:  # until the client hangs up
            await response.write(b": nothing yet\n\n" * 70_000)

    error = await failure(ask, respond)
    assert type(error) is ModelAnswerBroken
    assert str(32 << 20) in error.message


@pytest.mark.parametrize("kind", [STREAM, JSON], ids=["stream", "json"])
async def test_an_answer_that_blows_up_when_unpacked_is_given_up(ask: Ask, kind: dict[str, str]):
    bomb = gzip.compress(b": " + b"x" * (40 << 20))
    error = await failure(ask, sending([bomb], {**kind, "Content-Encoding": "gzip"}))
    assert type(error) is ModelAnswerBroken


def tool_calls(dialect: str, count: int, arguments: str) -> bytes:
    if dialect == "openai":
        function = {"name": "t", "arguments": arguments}
        parts = [
            {"choices": [{"delta": {"tool_calls": [{"index": at, "id": f"c{at}", "function": function}]}}]}
            for at in range(count)
        ]
    else:
        parts = []
        for at in range(count):
            block = {"type": "tool_use", "id": f"c{at}", "name": "t", "input": {}}
            parts.append({"type": "content_block_start", "index": at, "content_block": block})
            delta = {"type": "input_json_delta", "partial_json": arguments}
            parts.append({"type": "content_block_delta", "index": at, "delta": delta})
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts).encode()


async def test_ten_thousand_tool_calls_are_refused(ask: Ask, dialect: str):
    error = await failure(ask, sending([tool_calls(dialect, 10_000, "{}")], STREAM))
    assert type(error) is ModelAnswerBroken
    assert "64" in error.message


async def test_huge_arguments_are_refused(ask: Ask, dialect: str):
    error = await failure(ask, sending([tool_calls(dialect, 1, "x" * (1 << 20) + "x")], STREAM))
    assert type(error) is ModelAnswerBroken
    assert str(1 << 20) in error.message


async def test_garbage_instead_of_http_is_a_broken_answer(dialect: str):
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(garble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ModelAnswerBroken, match="HTTP"):
            await once(f"http://127.0.0.1:{port}/v1", dialect)


async def once(base_url: str, dialect: str) -> None:
    client = open_model(LLM(model=f"{dialect}/m", api_key=KEY, base_url=base_url))
    try:
        async with asyncio.timeout(30):
            await client.complete(HELLO)
    finally:
        await client.close()


async def test_nobody_listening_is_unavailability(dialect: str, unused_tcp_port: int):
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        await once(f"http://127.0.0.1:{unused_tcp_port}/v1", dialect)


@pytest.fixture
async def counting(dialect: str) -> AsyncIterator[tuple[ModelClient, list[object]]]:
    """A client of a good server, and the connections the server has seen."""
    connections: list[object] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.transport not in connections:
            connections.append(request.transport)
        return await sending([events(dialect, "Hi")], STREAM)(request)

    app = web.Application()
    app.router.add_post("/{tail:.*}", respond)
    async with TestServer(app) as server:
        client = open_model(LLM(model=f"{dialect}/m", base_url=str(server.make_url("/v1"))))
        yield client, connections
        await client.close()


async def test_one_connection_serves_call_after_call(counting: tuple[ModelClient, list[object]]):
    client, connections = counting
    for _ in range(3):
        await client.complete(HELLO)
    assert len(connections) == 1


async def test_a_closed_client_connects_again(counting: tuple[ModelClient, list[object]]):
    client, connections = counting
    await client.complete(HELLO)
    await client.close()
    await client.close()
    await client.complete(HELLO)
    assert len(connections) == 2


async def test_calls_at_the_same_time_do_not_disturb_each_other(counting: tuple[ModelClient, list[object]]):
    client, _ = counting
    answers = await asyncio.gather(*(client.complete(HELLO) for _ in range(10)))
    assert [answer.text for answer in answers] == ["Hi"] * 10


async def test_cancelling_hangs_up(dialect: str):
    asked, hung_up = asyncio.Event(), asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            hung_up.set()
        return response

    app = web.Application()
    app.router.add_post("/{tail:.*}", respond)
    async with asyncio.timeout(30), TestServer(app, handler_cancellation=True) as server:
        client = open_model(LLM(model=f"{dialect}/m", base_url=str(server.make_url("/v1"))))
        asking = asyncio.ensure_future(client.complete(HELLO))
        await asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await hung_up.wait()
        await client.close()


async def test_text_that_is_no_unicode_is_refused(dialect: str):
    client = open_model(LLM(model=f"{dialect}/m"))
    with pytest.raises(ModelRefused, match="surrogate"):
        await client.complete(ModelRequest(system="", turns=[UserTurn("a\ud800")]))


async def test_a_bug_in_the_listener_is_not_taken_for_a_failing_model(
    counting: tuple[ModelClient, list[object]],
):
    def listen(text: str, _: str) -> None:
        raise ZeroDivisionError

    client, _ = counting
    with pytest.raises(ZeroDivisionError):
        await client.complete(HELLO, on_delta=listen)
