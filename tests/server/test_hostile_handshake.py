"""Hostile requests and upgrades: what is sent, and the one answer that is acceptable."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.server.conftest import KEY
from tests.server.wire import GUARD, Headers, Wire, call, changed, request, upgrade, upgrade_headers

RIGHT = upgrade_headers(KEY)
PLAIN = [("Host", "localhost"), ("Authorization", f"Bearer {KEY}")]
STRANGER = upgrade_headers()
NEW = "/v1/conversations/new"


def up(headers: Headers, target: str = NEW, body: bytes = b"") -> bytes:
    return request("GET", target, headers, body)


def get(headers: Headers, target: str = "/v1/conversations") -> bytes:
    return request("GET", target, headers)


ORIGINS = {
    "01 foreign origin": [("Origin", "https://evil.example")],
    "01 origin null": [("Origin", "null")],
    "01 two origins": [("Origin", "http://localhost"), ("Origin", "http://localhost")],
    "01 look-alike origin": [("Origin", "http://localhost.evil")],
    "01 own origin, unlisted": [("Origin", "http://localhost:8000")],
}
REFUSED: dict[str, tuple[bytes, int, str]] = {
    **{row: (up(RIGHT + headers), 403, "origin_not_allowed") for row, headers in ORIGINS.items()},
    **{
        f"{row}, plain": (get(PLAIN + headers), 403, "origin_not_allowed") for row, headers in ORIGINS.items()
    },
    "02 foreign host": (up(changed(RIGHT, Host="evil.example:8000")), 421, "host_not_allowed"),
    "02 foreign host, open path": (get([("Host", "evil.example")], "/health"), 421, "host_not_allowed"),
    "02 absolute form": (up(RIGHT, f"http://evil.example{NEW}"), 400, "host_not_allowed"),
    "03 version 8": (up(changed(RIGHT, Sec_WebSocket_Version="8")), 426, "invalid_request"),
    "03 versions 13, 8": (up(changed(RIGHT, Sec_WebSocket_Version="13, 8")), 426, "invalid_request"),
    "03 two versions": (up([*RIGHT, ("Sec-WebSocket-Version", "13")]), 426, "invalid_request"),
    "03 no version": (up(changed(RIGHT, Sec_WebSocket_Version=None)), 426, "invalid_request"),
    "03 no upgrade at all": (get(PLAIN, NEW), 426, "invalid_request"),
    "03 upgrade to something else": (up(changed(RIGHT, Upgrade="h2c")), 426, "invalid_request"),
    "03 no Connection: upgrade": (up(changed(RIGHT, Connection="keep-alive")), 426, "invalid_request"),
    "04 two keys": (up([*RIGHT, ("Sec-WebSocket-Key", "A" * 22 + "==")]), 400, "invalid_request"),
    "04 key of 15 bytes": (up(changed(RIGHT, Sec_WebSocket_Key="A" * 20)), 400, "invalid_request"),
    "04 key is no base64": (up(changed(RIGHT, Sec_WebSocket_Key="!" * 24)), 400, "invalid_request"),
    "04 no key": (up(changed(RIGHT, Sec_WebSocket_Key=None)), 400, "invalid_request"),
    "05 content length": (up([*RIGHT, ("Content-Length", "5")], body=b"hello"), 400, "invalid_request"),
    "05 chunked body": (
        up([*RIGHT, ("Transfer-Encoding", "chunked")], body=b"5\r\nhello\r\n0\r\n\r\n"),
        400,
        "invalid_request",
    ),
    "06 key in the query": (up(STRANGER, f"{NEW}?token={KEY}"), 401, "use_header"),
    "06 key in the query, plain": (
        get([("Host", "localhost")], f"/v1/conversations?api_key={KEY}"),
        401,
        "use_header",
    ),
    "06 key in header and query": (up(RIGHT, f"{NEW}?access_token={KEY}"), 401, "use_header"),
    "06 key in a cookie": (
        get([("Host", "localhost"), ("Cookie", f"token={KEY}")], "/v1/conversations"),
        401,
        "unauthorized",
    ),
    "06 basic": (up([*STRANGER, ("Authorization", "Basic dXNlcjpwYXNz")]), 401, "use_header"),
    "06 two keys": (up([*RIGHT, ("Authorization", f"Bearer {KEY}")]), 401, "use_header"),
    "07 wrong key": (up(upgrade_headers("wrong")), 401, "unauthorized"),
    "07 empty key": (up([*STRANGER, ("Authorization", "Bearer ")]), 401, "unauthorized"),
    "07 half a key": (up(upgrade_headers(KEY[:-1])), 401, "unauthorized"),
    "07 key and more": (up(upgrade_headers(KEY + "x")), 401, "unauthorized"),
    "07 unknown conversation": (up(RIGHT, "/v1/conversations/nowhere"), 404, "conversation_not_found"),
    "07 no key, plain": (get([("Host", "localhost")]), 401, "unauthorized"),
    "10 500 subprotocols": (
        up(changed(RIGHT, Sec_WebSocket_Protocol=", ".join(f"p{n}" for n in range(500)))),
        400,
        "too_many_subprotocols",
    ),
    "10 foreign subprotocol": (
        up(changed(RIGHT, Sec_WebSocket_Protocol="graphql-ws")),
        400,
        "invalid_request",
    ),
}


@pytest.mark.parametrize(("data", "status", "kind"), REFUSED.values(), ids=REFUSED)
async def test_a_hostile_request_is_refused(server, data, status, kind):
    async with await server.wire() as wire:
        answer = await wire.ask(data)
        assert (answer.status, answer.kind) == (status, kind)
        assert "traceback" not in answer.body.decode().lower()


# What is no HTTP/1.1 at all: refused before anybody looks at keys. The second column: any of these.
MALFORMED: dict[str, tuple[bytes, set[int]]] = {
    "02 no host": (up(changed(RIGHT, Host=None)), {400}),
    "02 two hosts": (up([*RIGHT, ("Host", "localhost")]), {400}),
    "02 connect": (request("CONNECT", "evil.example:443", PLAIN), {400, 404, 405}),
    "06 header of 1 MB": (up([*RIGHT, ("X-Long", "x" * (1 << 20))]), {400, 431}),
    "06 200 headers": (up([*RIGHT, *((f"X-{n}", "x") for n in range(200))]), {400, 431}),
    "07 key with NUL": (up(upgrade_headers(KEY + "\0")), {400, 401}),
    "10 NUL in a header": (up([*RIGHT, ("X-Nul", "a\0b")]), {400}),
    "10 bare LF": (b"GET /health HTTP/1.1\nHost: localhost\n\n", {400}),
    "10 space before colon": (b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n", {400}),
    "10 folded header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", {400}),
    "10 no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", {400}),
    "10 HTTP/9.9": (request("GET", "/health", PLAIN, version="HTTP/9.9"), {400, 505}),
    "10 long request line": (get(PLAIN, "/" + "x" * (1 << 16)), {400, 414, 431}),
    "10 two lengths": (
        request("POST", "/v1/rpc", [*PLAIN, ("Content-Length", "2"), ("Content-Length", "3")], b"{}"),
        {400},
    ),
    "10 length and chunks": (
        request(
            "POST",
            "/v1/rpc",
            [*PLAIN, ("Content-Length", "2"), ("Transfer-Encoding", "chunked")],
            b"0\r\n\r\n",
        ),
        {400},
    ),
}


@pytest.mark.parametrize(("data", "statuses"), MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_http_gets_an_error_in_json_and_no_traceback(server, data, statuses):
    async with await server.wire() as wire:
        answer = await wire.ask(data)
        assert answer.status in statuses
        assert set(answer.json) == {"error"}
        assert set(answer.json["error"]) == {"code", "message", "data"}


async def test_426_says_which_version_is_spoken(server):
    async with await server.wire() as wire:
        answer = await wire.ask(up(changed(RIGHT, Sec_WebSocket_Version="8")))
        assert answer.headers["sec-websocket-version"] == "13"


SMUGGLED = request(
    "POST",
    "/v1/rpc",
    [*PLAIN, ("Content-Length", "123")],
    call("initialize", protocol_version=1, client={"name": "x", "version": "1"}).ljust(123),
)


@pytest.mark.parametrize(
    "first",
    [
        up([*RIGHT, ("Content-Length", "5")], body=b"hello"),
        up([*RIGHT, ("Transfer-Encoding", "chunked")], body=b"5\r\nhello\r\n0\r\n\r\n"),
        up(changed(RIGHT, Sec_WebSocket_Version="8")),
        up([*RIGHT, ("Origin", "https://evil.example")]),
        up(upgrade_headers("wrong")),
    ],
    ids=["05 length", "05 chunks", "05 version", "05 origin", "05 key"],
)
async def test_a_request_behind_a_refused_upgrade_never_runs(server, first):
    async with await server.wire() as wire:
        await wire.send(first + SMUGGLED)
        assert (await wire.answer()).status >= 400
        assert await wire.rest() == b""
    async with server.http() as http, http.get("/v1/conversations") as answer:
        assert await answer.json() == []


async def test_the_smuggled_request_would_have_worked_alone(server):
    async with await server.wire() as wire:
        assert (await wire.ask(SMUGGLED)).json["result"]["conversation"]


async def test_after_five_wrong_keys_the_address_has_to_wait(server):
    statuses = []
    for _ in range(7):
        async with await server.wire() as wire:
            answer = await wire.ask(get([("Host", "localhost"), ("Authorization", "Bearer wrong")]))
            statuses.append(answer.status)
    assert statuses == [401] * 5 + [429] * 2
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    async with await server.wire() as wire:
        assert (await wire.ask(get(PLAIN))).status == 200


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", upgrade(KEY)[:-4]],
    ids=["09 nothing", "09 half a line", "09 half the headers", "09 almost all"],
)
async def test_a_request_that_does_not_come_is_not_waited_for(start, data):
    async with start(handshake_seconds=0.2) as server, await server.wire() as wire:
        await wire.send(data)
        assert await wire.rest() == b""


async def test_a_request_that_dribbles_is_not_waited_for(start):
    async with start(handshake_seconds=0.3) as server, await server.wire() as wire:

        async def dribble() -> None:
            for byte in get(PLAIN, "/" + "x" * 5000):
                await wire.send(bytes([byte]))
                await asyncio.sleep(0.01)

        dribbling = asyncio.create_task(dribble())
        assert await wire.rest() == b""
        dribbling.cancel()


async def test_a_body_that_stops_is_answered_with_408(start):
    async with start(body_seconds=0.2) as server, await server.wire() as wire:
        answer = await wire.ask(
            request("POST", "/v1/rpc", [*PLAIN, ("Content-Length", "100")], b'{"jsonrpc"')
        )
        assert answer.status == 408
        assert await wire.rest() == b""


async def test_a_body_that_is_too_long_is_answered_with_413(start):
    async with start() as server, await server.wire() as wire:
        answer = await wire.ask(request("POST", "/v1/rpc", [*PLAIN, ("Content-Length", str(1 << 40))]))
        assert (answer.status, answer.kind) == (413, "limit_exceeded")


async def test_a_cookie_of_a_page_changes_nothing_about_a_connection(server):
    async with await server.wire() as wire:
        answer = await wire.ask(up([*STRANGER, ("Cookie", "token=of-another-page; session_api_key=x")]))
        assert answer.status == 101
        assert "result" in await wire.initialize(auth=KEY)


async def test_of_too_many_strangers_of_one_network_the_oldest_gives_way(start):
    async with start(max_strangers=4) as server:
        strangers = [await server.wire() for _ in range(4)]
        await strangers[0].upgrade(None)
        async with server.session():  # whoever has a key gets in as if nobody else were there
            assert (await strangers[0].ended()).code == 4429
        strangers += [await server.wire() for _ in range(2)]
        answer = await strangers[1].answer()
        assert (answer.status, answer.kind, answer.headers["retry-after"]) == (429, "overloaded", "1")
        assert "limit 4 connections without a key from one network" in answer.json["error"]["message"]
        assert (await strangers[2].ask(get(PLAIN))).status == 200
        for wire in strangers:
            await wire.__aexit__()


async def test_strangers_leave_a_quarter_of_the_places_to_those_with_a_key(start):
    async with start(max_connections=8) as server, AsyncExitStack() as stack:
        friends = [await stack.enter_async_context(server.session()) for _ in range(2)]
        strangers = [await stack.enter_async_context(await server.wire()) for _ in range(7)]
        assert (await strangers[0].answer()).status == 429
        friends += [await stack.enter_async_context(server.session()) for _ in range(6)]
        for friend in friends:
            assert "result" in await friend.call("ping", 7)
        async with await server.wire() as late:  # nobody is left who could give way
            assert (await late.answer()).status == 429


async def test_strangers_behind_a_trusted_proxy_are_told_apart_by_what_it_says_of_them(start):
    async def from_client(server, address: str):
        wire = await server.wire()
        headers = [("Host", "localhost"), ("X-Forwarded-For", f"203.0.113.9, {address}")]
        assert (await wire.ask(request("GET", "/health", headers))).status == 200
        return wire

    async with start(max_strangers=2, trusted_proxies=("127.0.0.0/8",)) as server:
        others = [await from_client(server, f"192.0.2.{number}") for number in range(5)]
        same = [await from_client(server, "198.51.100.1") for _ in range(3)]
        assert (await same[0].answer()).status == 429
        for wire in (*others, *same[1:]):
            assert (await wire.ask(request("GET", "/health", [("Host", "localhost")]))).status == 200
        for wire in (*others, *same):
            await wire.__aexit__()


async def test_strangers_cannot_fill_the_log(start):
    async with start(log_level="info") as server:
        for _ in range(20):
            async with await server.wire() as wire:
                await wire.upgrade(None)
                assert (await wire.initialize(auth="wrong"))["error"]["code"] in (-32003, -32001)
                await wire.ended()
        lines = server.log.getvalue().splitlines()
    assert len([line for line in lines if "request_refused" in line or "session_ended" in line]) < 20


async def test_who_has_shown_the_key_is_no_stranger(start):
    async with start(max_strangers=2) as server:
        friends = [await server.wire() for _ in range(2)]
        for wire in friends:
            assert (await wire.ask(get(PLAIN))).status == 200
        async with await server.wire() as third:
            assert (await third.ask(get(PLAIN))).status == 200
        for wire in friends:
            await wire.__aexit__()


async def test_the_number_of_connections_is_limited(start):
    async with start(max_connections=1) as server, await server.wire() as first:
        assert (await first.ask(get(PLAIN))).status == 200
        async with await server.wire() as second:
            assert (await second.answer()).status == 429
        await first.__aexit__()
        async with asyncio.timeout(GUARD):
            while (await _status(server)) == 429:
                pass


async def _status(server) -> int:
    async with await Wire.open(server.port) as wire:
        return (await wire.ask(get(PLAIN))).status


async def test_extensions_are_not_taken_up(server):
    async with await server.wire() as wire:
        answer = await wire.ask(
            up([*RIGHT, ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits")])
        )
        assert answer.status == 101
        assert "sec-websocket-extensions" not in answer.headers
        assert answer.headers["sec-websocket-protocol"] == "agentrpc.v1"


async def test_a_client_without_a_subprotocol_is_fine(server):
    async with await server.wire() as wire:
        answer = await wire.ask(up(changed(RIGHT, Sec_WebSocket_Protocol=None)))
        assert answer.status == 101
        assert "sec-websocket-protocol" not in answer.headers


async def test_a_thousand_malformed_requests_leave_a_handful_of_lines(server):
    for _ in range(100):
        async with await server.wire() as wire:
            await wire.ask(b"nonsense\r\n\r\n")
    written = server.log.getvalue()
    assert "nonsense" not in written
    assert 1 <= written.count("request_refused") <= 20
