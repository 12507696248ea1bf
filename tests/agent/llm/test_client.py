"""The client against real sockets: every way in which an answer may come, connections, cancellation."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent_sdk.agent.llm.client import open_model
from agent_sdk.models import ModelClient, ModelRequest, UserTurn
from agent_sdk.protocol.errors import ModelError, ModelRefused
from agent_sdk.protocol.specs import LLM
from tests.agent.llm.provider import HELLO, JSON, STREAM, WHOLE, Ask, events, sending


async def test_characters_cut_between_pieces_arrive_whole(ask: Ask, dialect: str):
    text = "Grüße 🎉 漢字"
    stream = events(dialect, text)
    answer = await ask(sending([bytes([byte]) for byte in stream], STREAM))
    assert answer.text == text


async def test_a_stream_without_a_content_type_is_read(ask: Ask, dialect: str):
    assert (await ask(sending([events(dialect, "Hi")], {"Content-Type": "text/plain"}))).text == "Hi"


async def test_a_whole_answer_is_read_although_a_stream_was_asked_for(ask: Ask, dialect: str):
    assert (await ask(sending([json.dumps(WHOLE[dialect]).encode()], JSON))).text == "Hi"


async def test_a_stream_is_read_although_a_whole_answer_was_asked_for(ask: Ask, dialect: str):
    assert (await ask(sending([events(dialect, "Hi")], STREAM), stream=False)).text == "Hi"


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json", "text/plain", "text/html", "x/y"])
@pytest.mark.parametrize("streams", [True, False])
async def test_the_bytes_of_a_body_say_what_it_is(ask: Ask, dialect: str, kind: str, streams: bool):
    whole = json.dumps(WHOLE[dialect]).encode()
    stream = events(dialect, "Hi")
    bodies = [whole, b"\xef\xbb\xbf \n" + whole, stream, b": busy\n\n" + stream, b"data: " + whole + b"\n\n"]
    for body in bodies:
        answer = await ask(sending([body], {"Content-Type": kind}), stream=streams)
        assert (answer.text, answer.finish_reason) == ("Hi", "stop"), body


async def test_a_stream_is_taken_whose_last_line_or_blank_line_is_missing(ask: Ask, dialect: str):
    stream = events(dialect, "Hi")
    marks = [b"\n\ndata: [DONE]\n\n", b"event: message_stop"]
    without_mark = next(stream[: stream.index(mark)] for mark in marks if mark in stream)
    for end in (b"", b"\n", b"\n\ndata: [DONE]", b"\n\ndata: [DONE]\n", b"\n\ndata: [DO"):
        assert (await ask(sending([without_mark.rstrip() + end], STREAM))).text == "Hi"
    assert (await ask(sending([stream.rstrip()], STREAM))).text == "Hi"


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json", "text/html"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "context too long"}}',
        b'[{"error": {"message": "context too long"}}]',
        b'{"error": "context too long"}',
        b'{"detail": "context too long"}',
        b'data: {"choices": null, "error_message": "context too long"}\n\n',
        b'data: {"choices": null, "error": {"message": "context too long"}}',
        b'{"choices": null, "base_resp": {"status_code": 1, "status_msg": "context too long"}}',
        b'event: error\ndata: {"message": "context too long"}\n\n',
        b': busy\n\n{"error": {"message": "context too long"}}\n',
        b"context too long",
    ],
)
async def test_the_providers_own_words_arrive_whatever_they_are_wrapped_in(ask: Ask, kind: str, body: bytes):
    with pytest.raises(ModelError, match="context too long"):
        await ask(sending([body], {"Content-Type": kind}))


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


async def test_a_connection_is_kept_although_its_end_comes_late(dialect: str):
    connections: list[object] = []
    heard = asyncio.Event()

    async def respond(request: web.Request) -> web.StreamResponse:
        if request.transport not in connections:
            connections.append(request.transport)
        response = await sending([events(dialect, "Hi")], STREAM)(request)
        await heard.wait()
        heard.clear()
        return response

    app = web.Application()
    app.router.add_post("/{tail:.*}", respond)
    async with asyncio.timeout(30), TestServer(app) as server:
        client = open_model(LLM(model=f"{dialect}/m", base_url=str(server.make_url("/v1"))))
        for _ in range(3):
            await client.complete(HELLO, on_delta=lambda *_: heard.set())
        await client.close()
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
