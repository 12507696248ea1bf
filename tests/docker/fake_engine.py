"""An engine that answers as a test tells it to, on a real socket: wrongly, late, or not at all."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

VERSION = {
    "Version": "28.2.2",
    "ApiVersion": "1.50",
    "Os": "linux",
    "Arch": "amd64",
    "Components": [{"Name": "runc", "Version": "1.2.6"}],
}
INFO = {"Name": "fake", "SystemTime": "2026-01-01T00:00:00.5Z", "Runtimes": {"runc": {}}}
INFO["IndexServerAddress"] = "https://usual.test/v1/"


class FakeEngine:
    """Answers by the first of its rules that fits; `calls` is what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/fake.sock"
        self._path = f"{folder}/fake.sock"
        self._rules: list[tuple[str, Handler]] = []
        self.calls: list[str] = []
        self.asked = asyncio.Condition()
        self.answer("GET /version", VERSION)
        self.answer("GET /info", INFO)

    def on(self, call: str, handler: Handler) -> None:
        """Have calls that begin like this (`POST /containers/create`) answered by a handler."""
        self._rules.insert(0, (call, handler))

    def answer(
        self, call: str, body: object = None, status: int = 200, content_type: str = "application/json"
    ) -> None:
        """Answer with JSON, or with text as it is."""

        async def handler(request: web.Request) -> web.Response:
            text = body if isinstance(body, str) else json.dumps(body)
            return web.Response(text=text, status=status, content_type=content_type)

        self.on(call, handler)

    async def called(self, call: str) -> str:
        """Wait until something was called that begins like this."""
        async with self.asked:
            await self.asked.wait_for(lambda: any(made.startswith(call) for made in self.calls))
        return next(made for made in self.calls if made.startswith(call))

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/v1.50")
        call = f"{request.method} {path}"
        async with self.asked:
            self.calls.append(f"{call}?{request.query_string}" if request.query_string else call)
            self.asked.notify_all()
        for start, handler in self._rules:
            if call.startswith(start):
                return await handler(request)
        return web.json_response({"message": f"page not found: {call}"}, status=404)

    @asynccontextmanager
    async def listening(self, *, tcp: bool = False):
        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await runner.setup()
        Path(self._path).unlink(missing_ok=True)
        try:
            await web.UnixSite(runner, self._path).start()
            if tcp:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.url = f"tcp://127.0.0.1:{runner.addresses[-1][1]}"
            yield self
        finally:
            await runner.cleanup()


async def never(request: web.Request) -> web.StreamResponse:
    """Does not answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def slam(request: web.Request) -> web.StreamResponse:
    """Closes the connection without an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def stream(*pieces: bytes, end: bool = True, announced: int | None = None) -> Handler:
    """Sends these bytes, and ends or hangs; `announced`: a length that is never reached."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = announced
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if not end:
            await asyncio.Event().wait()
        if announced is not None:
            assert request.transport is not None
            request.transport.abort()
        return response

    return handler
