"""Answers that no provider should give: each is one typed error, and never shows the key."""

import asyncio
import gzip
import json

import pytest
from aiohttp import web

from agent_sdk.agent.llm.client import open_model
from agent_sdk.protocol.errors import (
    ModelAnswerBroken,
    ModelAnswerTooLarge,
    ModelError,
    ModelRefused,
    ModelUnauthorized,
    ModelUnavailable,
)
from agent_sdk.protocol.specs import LLM
from tests.agent.llm.provider import HELLO, JSON, KEY, STREAM, WHOLE, Ask, Respond, events, sending


async def failure(ask: Ask, respond: Respond, **options: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await ask(respond, **options)
    assert KEY not in str(caught.value) + str(caught.value.details)
    return caught.value


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


async def test_a_line_dropped_in_mid_answer_is_a_broken_answer(ask: Ask, dialect: str):
    stream = events(dialect, "Hello there")
    error = await failure(ask, sending([stream[: len(stream) // 2]], STREAM, cut=True))
    assert type(error) is ModelAnswerBroken
    assert "middle" in error.message


async def test_a_stream_that_ends_too_early_is_a_broken_answer(ask: Ask, dialect: str):
    stream = events(dialect, "Hello there")
    assert type(await failure(ask, sending([stream[: len(stream) // 2]], STREAM))) is ModelAnswerBroken


async def test_an_answer_that_had_come_is_not_lost_with_the_line(ask: Ask, dialect: str):
    whole, stream = json.dumps(WHOLE[dialect]).encode(), events(dialect, "Hi")
    marks = (b"data: [DONE]", b"event: message_stop")
    for body in (whole, *(stream.partition(mark)[0] for mark in marks if mark in stream)):
        assert (await ask(sending([body], STREAM, cut=True))).text == "Hi"


async def test_the_status_of_a_failure_is_not_lost_with_the_line(ask: Ask):
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=401, headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"no such key")
        request.transport.abort()
        return response

    error = await failure(ask, respond)
    assert type(error) is ModelUnauthorized
    assert "no such key" in error.message


async def test_any_status_of_success_is_one(ask: Ask, dialect: str):
    async def respond(_: web.Request) -> web.StreamResponse:
        return web.json_response(WHOLE[dialect], status=201)

    assert (await ask(respond)).text == "Hi"


@pytest.mark.parametrize("kind", [STREAM, JSON], ids=["stream", "json"])
async def test_a_damaged_compression_is_a_broken_answer(ask: Ask, dialect: str, kind: dict[str, str]):
    stream = events(dialect, "Hello there")
    packed = gzip.compress(stream)
    for body in (packed[:-40], packed[:20] + b"\xff\xff" + packed[22:], stream, b"\x1f\x8b"):
        error = await failure(ask, sending([body], {**kind, "Content-Encoding": "gzip"}))
        assert type(error) is ModelAnswerBroken


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


@pytest.mark.parametrize("kind", [STREAM, JSON], ids=["stream", "json"])
async def test_an_endless_answer_is_given_up(ask: Ask, kind: dict[str, str]):
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=kind)
        await response.prepare(request)
        while True:  # until the client hangs up
            await response.write(b": nothing yet\n\n" * 70_000)

    error = await failure(ask, respond)
    assert type(error) is ModelAnswerTooLarge
    assert str(32 << 20) in error.message


@pytest.mark.parametrize("kind", [STREAM, JSON], ids=["stream", "json"])
async def test_an_answer_that_blows_up_when_unpacked_is_given_up(ask: Ask, kind: dict[str, str]):
    bomb = gzip.compress(b": " + b"x" * (40 << 20))
    error = await failure(ask, sending([bomb], {**kind, "Content-Encoding": "gzip"}))
    assert type(error) is ModelAnswerTooLarge


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
    assert type(error) is ModelAnswerTooLarge
    assert "64" in error.message


async def test_huge_arguments_are_refused(ask: Ask, dialect: str):
    error = await failure(ask, sending([tool_calls(dialect, 1, "x" * (1 << 20) + "x")], STREAM))
    assert type(error) is ModelAnswerTooLarge
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


async def test_a_page_instead_of_an_answer_is_broken(ask: Ask):
    error = await failure(
        ask, sending([b"<html>Sign in</html>"], {"Content-Type": "text/html; charset=utf-8"})
    )
    assert type(error) is ModelAnswerBroken
    assert "base_url" in error.message


async def test_an_error_with_status_200_is_an_error(ask: Ask):
    error = await failure(
        ask, sending([b'{"error": {"message": "out of cheese, ' + KEY.encode() + b'"}}'], JSON)
    )
    assert type(error) is ModelAnswerBroken
    assert "out of cheese" in error.message
