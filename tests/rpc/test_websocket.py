"""Pipes over aiohttp: what WebSockets add, against real sockets."""

import asyncio
import os
import socket
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import aiohttp
import pytest

from agent_sdk.protocol.errors import ConnectionLost
from agent_sdk.protocol.methods.workspace import DiffText, GitDiff
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.websocket import WebSocketPipe
from tests.rpc.links import web_server

pytestmark = pytest.mark.timeout(30)


class Ending:
    """The accepting end: receives until the connection ends, and keeps how."""

    def __init__(self):
        self.lost = asyncio.get_running_loop().create_future()

    async def __call__(self, pipe):
        try:
            while True:
                await pipe.receive()
        except ConnectionLost as lost:
            self.lost.set_result(lost)


async def test_text_that_is_not_utf8_ends_the_connection():
    ending = Ending()
    async with (
        web_server(ending) as url,
        aiohttp.ClientSession() as session,
        session.ws_connect(url) as ws,
    ):
        await ws.send_frame(b"\xff\xfe", aiohttp.WSMsgType.TEXT)
        message = await ws.receive()
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1007)
        assert (await ending.lost).details["close_code"] == 1007


async def test_an_end_that_has_nothing_to_send_says_unasked_that_it_is_alive():
    """The question may be stuck behind bytes that move slowly."""
    async with (
        web_server(Ending(), heartbeat=0.02) as url,
        aiohttp.ClientSession() as session,
        session.ws_connect(url, autoping=False) as ws,
    ):
        for _ in range(2):
            assert (await ws.receive(timeout=10)).type is aiohttp.WSMsgType.PONG


async def test_a_frame_that_is_too_long_ends_the_connection():
    ending = Ending()
    async with (
        web_server(ending) as url,
        aiohttp.ClientSession() as session,
        session.ws_connect(url) as ws,
    ):
        await ws.send_bytes(bytes((1 << 20) + 1))
        lost = await ending.lost
        assert lost.details["close_code"] == 1009
        assert "exceeds limit" in lost.details["reason"]


async def test_a_frame_of_the_greatest_length_is_accepted():
    got = asyncio.get_running_loop().create_future()

    async def accept(pipe):
        got.set_result(await pipe.receive())

    async with (
        web_server(accept) as url,
        aiohttp.ClientSession() as session,
        session.ws_connect(url) as ws,
    ):
        await ws.send_bytes(bytes(1 << 20))
        assert await got == (bytes(1 << 20), False)


async def test_pings_are_answered_and_are_no_frames():
    ending = Ending()
    async with web_server(ending) as url, aiohttp.ClientSession() as session:
        async with session.ws_connect(url, autoping=False) as ws:
            await ws.ping(b"there?")
            message = await ws.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.PONG, b"there?")
        assert (await ending.lost).details["close_code"] == 1000


async def test_the_reason_of_a_close_arrives():
    ending = Ending()
    async with web_server(ending) as url, aiohttp.ClientSession() as session:
        ws = await session.ws_connect(url)
        await ws.close(code=4409, message=b"another window")
        assert (await ending.lost).details == {"close_code": 4409, "reason": "another window"}


async def test_a_connection_that_breaks_ends_with_1006():
    ending = Ending()
    async with web_server(ending) as url, aiohttp.ClientSession() as session:
        ws = await session.ws_connect(url)
        ws.get_extra_info("socket").shutdown(2)
        assert (await ending.lost).details["close_code"] == 1006
        await ws.close()


async def test_text_may_be_decoded_already():
    got = asyncio.get_running_loop().create_future()

    async def accept(pipe):
        await pipe.send("ä".encode(), text=True)
        got.set_result(await pipe.receive())

    async with web_server(accept) as url, aiohttp.ClientSession() as session:
        pipe = WebSocketPipe(await session.ws_connect(url))
        assert await pipe.receive() == ("ä".encode(), True)
        await pipe.send(b"x", text=True)
        assert await got == (b"x", True)
        await pipe.close()


@asynccontextmanager
async def deaf_client(url):
    """Upgrades by hand and then reads nothing more."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1024)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    try:
        yield
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def is_over(connection):
    """Whether nothing more can be sent, in contrast to: now there is no room."""
    if connection.fileno() < 0:
        return True
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        try:
            same.send(b"x")
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        return False


async def test_a_client_that_reads_nothing_cannot_keep_a_pipe_open():
    ended = asyncio.get_running_loop().create_future()

    async def accept(pipe):
        flooding = asyncio.create_task(flood(pipe))
        await asyncio.wait({flooding}, timeout=0.2)
        connection = pipe._ws.get_extra_info("socket")
        await pipe.close(4408, "slow")
        assert is_over(connection)
        ended.set_result((await asyncio.gather(flooding, return_exceptions=True))[0])

    async with web_server(accept, patience=0.2) as url, deaf_client(url):
        assert isinstance(await ended, ConnectionLost)


async def test_a_client_that_reads_nothing_cannot_keep_a_peer_open():
    ended = asyncio.get_running_loop().create_future()

    async def accept(pipe):
        async with Peer(pipe, opener=False, strict=True) as peer:
            for _ in range(200):  # 20 MB fit into no transport
                peer.publish(b'"%b"' % (b"x" * 100_000), epoch="e")
                await asyncio.sleep(0)
            await peer.close(4408, "slow")
            ended.set_result(await peer.wait_closed())

    async with web_server(accept, patience=0.2) as url, deaf_client(url):
        assert (await ended).details["close_code"] == 4408


async def flood(pipe):
    while True:
        await pipe.send(bytes(1 << 18), text=False)


async def test_a_peer_survives_a_client_that_vanishes_in_a_call():
    entered, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(params, call):
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return DiffText("")

    async def accept(pipe):
        async with Peer(pipe, {GitDiff: wait}, opener=False, strict=True) as peer:
            assert (await peer.wait_closed()).details["close_code"] == 1006

    async with web_server(accept) as url, aiohttp.ClientSession() as session:
        ws = await session.ws_connect(url)
        await ws.send_json({"jsonrpc": "2.0", "id": 1, "method": "git.diff"})
        await entered.wait()
        ws.get_extra_info("socket").shutdown(2)
        await cancelled.wait()
        await ws.close()
