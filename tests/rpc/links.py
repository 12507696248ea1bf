"""Connected pipes and peers for tests, over each transport."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import Pipe, memory_pipes
from agent_sdk.rpc.unix import connect_unix, serve_unix
from agent_sdk.rpc.websocket import WebSocketPipe

Pipes = tuple[Pipe, Pipe]
TRANSPORTS = ("memory", "unix", "websocket")


@asynccontextmanager
async def connect(transport: str, folder: Path) -> AsyncIterator[Pipes]:
    """The opener's end and the accepting end."""
    if transport == "memory":
        yield memory_pipes()
        return
    accepted: asyncio.Future[Pipe] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def accept(pipe: Pipe) -> None:
        accepted.set_result(pipe)
        await over.wait()

    opened = over_unix if transport == "unix" else over_websocket
    async with opened(folder, accept) as pipe:
        try:
            yield pipe, await accepted
        finally:
            over.set()
            await asyncio.gather(pipe.close(), accepted.result().close())


@asynccontextmanager
async def over_unix(folder: Path, accept: Callable[[Pipe], Awaitable[None]]) -> AsyncIterator[Pipe]:
    path = str(folder / "socket")
    async with serve_unix(path, accept):
        yield await connect_unix(path)


@asynccontextmanager
async def over_websocket(folder: Path, accept: Callable[[Pipe], Awaitable[None]]) -> AsyncIterator[Pipe]:
    async with web_server(accept) as url, aiohttp.ClientSession() as session:
        socket = await session.ws_connect(url, decode_text=False, compress=0, max_msg_size=(1 << 20) + 1)
        yield WebSocketPipe(socket)


@asynccontextmanager
async def web_server(
    accept: Callable[[Pipe], Awaitable[None]], *, patience: float = 5, heartbeat: float | None = None
) -> AsyncIterator[str]:
    """A web server whose every path is a WebSocket."""

    async def upgrade(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(decode_text=False, compress=False, max_msg_size=(1 << 20) + 1)
        await socket.prepare(request)
        await accept(WebSocketPipe(socket, patience=patience, heartbeat=heartbeat))
        return socket

    app = web.Application()
    app.router.add_get("/", upgrade)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/"
    finally:
        await runner.cleanup()


class Raw:
    """A pipe spoken by hand: JSON in and out, binary frames as they are."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    async def send(self, message: object) -> None:
        await self.pipe.send(json.dumps(message).encode(), text=True)

    async def call(self, id: object, method: str, /, **params: object) -> None:
        await self.send({"jsonrpc": "2.0", "id": id, "method": method, "params": params})

    async def send_binary(self, frame: bytes) -> None:
        await self.pipe.send(frame, text=False)

    async def receive(self) -> object:
        frame, text = await self.pipe.receive()
        return json.loads(frame) if text else frame


@asynccontextmanager
async def raw_to_peer(handlers=None, **options) -> AsyncIterator[tuple[Raw, Peer]]:
    """A hand-written client and the accepting peer."""
    here, there = memory_pipes()
    async with Peer(there, handlers or {}, opener=False, strict=True, **options) as peer:
        yield Raw(here), peer
        await here.close()


SMALL = Limits(window_bytes=64 << 10, queue_bytes=64 << 10)
