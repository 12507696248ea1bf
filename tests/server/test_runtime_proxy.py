"""What goes through the proxy of the Runtime API arrives as it was sent, in both directions."""

import asyncio
import gzip
import io
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from yarl import URL

from agent_server.config.sources import StartRefused
from agent_server.http.connection import Connection, ConnectionLimiter
from agent_server.http.security import Authority, HostRules, OriginRules, Security
from agent_server.keys import ApiKey
from agent_server.logs import opened
from agent_server.metrics import Metrics
from agent_server.runtime_api.proxy import RuntimeProxy
from agent_server.runtime_api.record import Record
from agent_server.runtime_api.runtime import Runtime
from workspaces.backend.contract import Ending

MIB = 1 << 20


class StandingServer:
    """A server that runs already, at this address."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def start(self, seconds: float) -> None:
        pass

    async def ended(self) -> Ending:
        await asyncio.Event().wait()

    async def pause(self) -> None:
        pass

    async def let_go(self) -> None:
        pass


class Behind:
    """The server behind the proxy."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.sent = 0
        self.closed = None

    async def echo(self, request):
        body = await request.read()
        seen = {"method": request.method, "path": request.raw_path, "headers": dict(request.headers)}
        headers = {"Connection": "X-Mine", "X-Mine": "1", "X-Theirs": "2"}
        return web.json_response({**seen, "body": body.decode("latin-1")}, headers=headers)

    async def pieces(self, request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: one\n\n")
        await self.go_on.wait()
        await response.write(b"data: two\n\n")
        return response

    async def mirror(self, request):
        response = web.StreamResponse()
        await response.prepare(request)
        async for piece in request.content.iter_any():
            await response.write(piece)
        return response

    async def zipped(self, request):
        return web.Response(body=gzip.compress(b"hello"), headers={"Content-Encoding": "gzip"})

    async def broken(self, request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"some")
        request.transport.abort()
        return response

    async def redirect(self, request):
        raise web.HTTPFound("http://elsewhere.example/", headers={"Set-Cookie": "a=b"})

    async def own(self, request):
        headers = {**FOR_THE_ORIGIN, "Content-Security-Policy": "default-src *"}
        return web.Response(text="<script>alert(1)</script>", content_type="text/html", headers=headers)

    async def socket(self, request):
        socket = web.WebSocketResponse(protocols=("spoken",), max_msg_size=0)
        await socket.prepare(request)
        await socket.send_str("first")
        try:
            async for message in socket:
                await self._react(socket, message)
        finally:  # it may be cancelled when its client is gone
            self.closed = socket.close_code
            self.ended.set()
        return socket

    async def _react(self, socket, message):
        match message.data:
            case "close":
                await socket.close(code=4408, message=b"too slow")
            case "flood":
                for _ in range(1024):
                    await socket.send_bytes(bytes(64 << 10))
                    self.sent += 64 << 10
            case str():
                await socket.send_str(message.data)
            case _:
                await socket.send_bytes(message.data)

    def app(self):
        app = web.Application(client_max_size=64 * MIB)
        app.router.add_get("/pieces", self.pieces)
        app.router.add_post("/mirror", self.mirror)
        app.router.add_get("/zipped", self.zipped)
        app.router.add_get("/broken", self.broken)
        app.router.add_get("/redirect", self.redirect)
        app.router.add_get("/own", self.own)
        app.router.add_get("/socket", self.socket)
        app.router.add_route("*", "/{rest:.*}", self.echo)
        return app


def runtime(tmp_path, logs, url):
    record = Record(
        session_id="s",
        runtime_id="r",
        tenant="t",
        api_key="k",
        image="i",
        environment={},
        resource_factor=1,
        cpus=1,
        memory=1,
        runtime_class=None,
        image_pull_policy="Never",
        created=0,
    )
    return Runtime(record, StandingServer(url), tmp_path, logs, start_seconds=5)


async def health(request):
    return web.Response(text="of the server itself")


@pytest.fixture
def behind():
    return Behind()


@pytest.fixture
async def proxied(behind, aiohttp_server, tmp_path):
    """A client of the proxy, and the runtime it leads to."""
    server = await aiohttp_server(behind.app(), auto_decompress=False)
    with opened(style="json", stream=io.StringIO()) as logs:
        it = runtime(tmp_path, logs, str(server.make_url("")).rstrip("/"))
        await it.start()
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(
                RuntimeProxy(lambda id: it if id == "r" else None, "http://{id}.agents.example:8443")
            )
            rules = (HostRules("127.0.0.1"), OriginRules(), Authority(ApiKey("x" * 20)), logs, Metrics())
            security = Security(*rules, [proxy.serve], proxy.at)
            app = web.Application(middlewares=security.middlewares())
            app.router.add_get("/health", health)
            app.router.add_route("*", r"/runtimes/{runtime_id}/{rest:.*}", proxy.serve)
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            limiter = ConnectionLimiter(100, 100, Metrics())

            def connect():
                return Connection(runner.server, limiter, longest_message=MIB, auto_decompress=False)

            listener = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
            stack.callback(listener.close)
            port = listener.sockets[0].getsockname()[1]
            http = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))
            http.it, http.port = it, port
            yield http
        await it.close(end=False)


# --- HTTP ---


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_a_request_goes_on_as_it_came(proxied, method):
    path = "/runtimes/r/a%2Fb//c/%2e%2e/d?x=%20&y=1&y=2"
    url = URL(f"http://127.0.0.1:{proxied.port}{path}", encoded=True)
    async with proxied.request(method, url, data=b"body" if method != "GET" else None) as answer:
        seen = await answer.json()
    assert (seen["method"], seen["path"]) == (method, "/a%2Fb//c/%2e%2e/d?x=%20&y=1&y=2")
    assert seen["body"] == ("" if method == "GET" else "body")


async def test_the_answer_to_head_has_a_length_and_no_body(proxied):
    async with proxied.head("/runtimes/r/zipped") as answer:
        assert (answer.status, int(answer.headers["Content-Length"]) > 0) == (200, True)
        assert await answer.read() == b""


async def test_headers_of_one_connection_and_the_key_of_the_tenant_stay_here(proxied):
    headers = {
        "Authorization": "Bearer theirs",
        "X-API-Key": "mine",
        "X-Session-API-Key": "theirs",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "Proxy-Authorization": "mine",
        "TE": "trailers",
    }
    async with proxied.get("/runtimes/r/x", headers=headers) as answer:
        seen = (await answer.json())["headers"]
        assert "X-Mine" not in answer.headers
        assert answer.headers["X-Theirs"] == "2"
    assert (seen["Authorization"], seen["X-Session-API-Key"]) == ("Bearer theirs", "theirs")
    assert not {"X-API-Key", "X-Hop", "Proxy-Authorization", "TE"} & set(seen)
    assert seen["Host"] == proxied.it.url.removeprefix("http://")


async def test_an_answer_is_passed_on_piece_by_piece(proxied, behind):
    async with proxied.get("/runtimes/r/pieces") as answer:
        assert await answer.content.readuntil(b"\n\n") == b"data: one\n\n"
        behind.go_on.set()
        assert await answer.content.read() == b"data: two\n\n"


async def test_a_body_is_passed_on_piece_by_piece(proxied):
    heard = asyncio.Queue()

    async def body():
        for piece in (b"one", b"two"):
            yield piece
            assert await heard.get() == piece

    async with proxied.post("/runtimes/r/mirror", data=body()) as answer:
        async for piece in answer.content.iter_any():
            heard.put_nowait(piece)


async def test_compressed_content_goes_through_as_it_is(proxied):
    async with proxied.get("/runtimes/r/zipped") as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert await answer.read() == b"hello"
    packed, headers = gzip.compress(b"hello"), {"Content-Encoding": "gzip"}
    async with proxied.post("/runtimes/r/x", data=packed, headers=headers) as answer:
        assert (await answer.json())["body"].encode("latin-1") == packed


async def test_a_redirect_of_the_runtime_is_its_clients_to_follow(proxied):
    async with proxied.get("/runtimes/r/redirect", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (302, "http://elsewhere.example/")


FOR_THE_ORIGIN = {
    "Set-Cookie": "token=theirs; Path=/",
    "Service-Worker-Allowed": "/",
    "Clear-Site-Data": '"*"',
    "Strict-Transport-Security": "max-age=1",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Allow-Headers": "*",
    "Alt-Svc": 'h3="elsewhere.example:443"',
    "Report-To": "{}",
}


@pytest.mark.parametrize("named", [False, True], ids=["by path", "by name"])
async def test_only_under_a_name_of_its_own_a_runtime_may_act_for_the_whole_name(proxied, named):
    url, headers = ("/own", {"Host": "r.agents.example:8443"}) if named else ("/runtimes/r/own", {})
    async with proxied.get(url, headers=headers) as answer:
        assert await answer.text() == "<script>alert(1)</script>"
        passed = {name: answer.headers[name] for name in FOR_THE_ORIGIN if name in answer.headers}
        policies = answer.headers.getall("Content-Security-Policy")
    assert passed == (FOR_THE_ORIGIN if named else {})
    assert policies == ["default-src *", *([] if named else ["sandbox"])]


async def test_the_name_of_a_runtime_leads_to_it_whatever_the_path(proxied):
    for path in ("/health", "/runtimes/r/x", "/v1/conversations?a=1"):
        async with proxied.get(path, headers={"Host": "R.agents.example"}) as answer:
            assert (await answer.json())["path"] == path
    async with proxied.get("/health") as answer:
        assert await answer.text() == "of the server itself"
    async with proxied.get("/health", headers={"Host": "other.agents.example"}) as answer:
        assert answer.status == 404
    for host in ("r.r.agents.example", "agents.example", "r.agents.example.evil", "r-agents.example"):
        async with proxied.get("/health", headers={"Host": host}) as answer:
            assert answer.status == 421
    async with proxied.ws_connect("/socket", headers={"Host": "r.agents.example"}) as socket:
        assert await socket.receive_str() == "first"


async def test_a_target_that_would_lead_elsewhere_goes_nowhere(proxied):
    reader, writer = await asyncio.open_connection("127.0.0.1", proxied.port)
    writer.write(
        b"GET http://elsewhere.example/ HTTP/1.1\r\nHost: r.agents.example\r\nConnection: close\r\n\r\n"
    )
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()


@pytest.mark.parametrize(
    ("origin", "passed"),
    [("https://r.agents.example:8443", None), ("https://elsewhere.example", "https://elsewhere.example")],
)
async def test_pages_of_others_are_the_runtimes_to_admit(proxied, origin, passed):
    headers = {"Host": "r.agents.example:8443", "Origin": origin}
    async with proxied.get("/x", headers=headers) as answer:
        assert (await answer.json())["headers"].get("Origin") == passed


@pytest.mark.parametrize(
    "url", ["https://agents.example/{id}", "https://a.{id}.example", "https://{id}", "https://x{id}.example"]
)
def test_an_id_that_is_not_the_first_part_of_the_host_is_refused(url):
    with pytest.raises(StartRefused, match="must be the first part of the host"):
        RuntimeProxy(lambda id: None, url)


async def test_an_answer_that_breaks_off_does_not_look_whole(proxied):
    with pytest.raises(aiohttp.ClientError):
        async with proxied.get("/runtimes/r/broken") as answer:
            await answer.read()


async def test_what_cannot_be_reached_has_a_status_of_its_own(proxied, unused_tcp_port):
    async with proxied.get("/runtimes/other/x") as answer:
        assert answer.status == 404
    await proxied.it.pause()
    async with proxied.get("/runtimes/r/x") as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "it is paused" in (await answer.json())["error"]["message"]
    await proxied.it.start()
    proxied.it._server.url = f"http://127.0.0.1:{unused_tcp_port}"
    async with proxied.get("/runtimes/r/x") as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (502, "1")


# --- WebSocket ---


async def test_messages_of_a_mebibyte_arrive_in_both_directions(proxied):
    async with proxied.ws_connect(
        "/runtimes/r/socket", protocols=("other", "spoken"), max_msg_size=0
    ) as socket:
        assert socket.protocol == "spoken"
        assert await socket.receive_str() == "first"
        text, data = "ü" * (MIB // 2), bytes(range(256)) * (MIB // 256)
        await socket.send_str(text)
        assert await socket.receive_str() == text
        await socket.send_bytes(data)
        assert await socket.receive_bytes() == data


async def test_pings_are_answered_by_the_other_end(proxied):
    async with proxied.ws_connect("/runtimes/r/socket", autoping=False) as socket:
        await socket.receive_str()
        await socket.ping(b"are you there")
        message = await socket.receive()
        assert (message.type, bytes(message.data)) == (WSMsgType.PONG, b"are you there")


async def test_close_codes_arrive_in_both_directions(proxied, behind):
    async with proxied.ws_connect("/runtimes/r/socket") as socket:
        await socket.receive_str()
        await socket.send_str("close")
        message = await socket.receive()
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4408, "too slow")
    behind.ended.clear()
    async with proxied.ws_connect("/runtimes/r/socket") as socket:
        await socket.receive_str()
        await socket.close(code=4001)
    await behind.ended.wait()
    assert behind.closed == 4001


async def test_a_client_that_is_gone_is_gone_at_the_other_end(proxied, behind):
    reader, writer = await asyncio.open_connection("127.0.0.1", proxied.port)
    writer.write(
        b"GET /runtimes/r/socket HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    await reader.readuntil(b"first")
    writer.transport.abort()
    await behind.ended.wait()


async def test_a_runtime_that_is_ahead_of_its_reader_waits_for_it(proxied, behind):
    async with proxied.ws_connect("/runtimes/r/socket", max_msg_size=0) as socket:
        await socket.receive_str()
        await socket.send_str("flood")
        for _ in range(100):  # meanwhile nobody reads what floods the other connection
            async with proxied.get("/runtimes/r/x") as answer:
                await answer.read()
        assert 0 < behind.sent < 16 * MIB
        for _ in range(1024):
            assert len(await socket.receive_bytes()) == 64 << 10


async def test_a_refused_upgrade_is_an_ordinary_answer(proxied):
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await proxied.ws_connect("/runtimes/r/echo")
    assert refused.value.status == 200
