"""Speaking HTTP and WebSocket by hand, right or wrong: what well-behaved clients refuse to send."""

from __future__ import annotations

import asyncio
import os
import re
import struct
from base64 import b64encode
from typing import Any, NamedTuple, Self

import msgspec

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
GUARD = 20
"""Seconds after which a test that hangs fails."""

Headers = list[tuple[str, str]]


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def kind(self) -> str:
        return self.json["error"]["data"]["kind"]


class Ended(NamedTuple):
    """How a WebSocket was closed."""

    code: int
    reason: str


def request(
    method: str, target: str, headers: Headers, body: bytes = b"", version: str = "HTTP/1.1"
) -> bytes:
    lines = [f"{method} {target} {version}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + body


def upgrade(key: str | None = None, *, path: str = "/v1/conversations/new") -> bytes:
    return request("GET", path, upgrade_headers(key))


def upgrade_headers(key: str | None = None) -> Headers:
    """The headers of a right upgrade request."""
    headers = [
        ("Host", "localhost"),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", b64encode(os.urandom(16)).decode()),
        ("Sec-WebSocket-Protocol", "agentrpc.v1"),
    ]
    return [*headers, ("Authorization", f"Bearer {key}")] if key else headers


def changed(headers: Headers, **values: str | None) -> Headers:
    """The headers with some replaced, or left out where the value is None; `_` stands for `-`."""
    names = {name.replace("_", "-").lower(): value for name, value in values.items()}
    kept = [(name, value) for name, value in headers if name.lower() not in names]
    return kept + [(name, value) for name, value in names.items() if value is not None]


def frame(
    opcode: int, payload: bytes = b"", *, final=True, masked=True, rsv=0, width=None, length=None
) -> bytes:
    """One frame as a client sends it, right or wrong; `length` may lie, `width` is that of its field in bytes."""
    size = len(payload) if length is None else length
    width = width if width is not None else 0 if size < 126 else 2 if size <= 0xFFFF else 8
    flag = 0x80 if masked else 0
    head = bytes([(0x80 if final else 0) | rsv | opcode])
    if width == 0:
        head += bytes([flag | size])
    elif width == 2:
        head += bytes([flag | 126]) + struct.pack(">H", size)
    else:
        head += bytes([flag | 127]) + struct.pack(">Q", size)
    if not masked:
        return head + payload
    mask = os.urandom(4)
    stretched = (mask * (len(payload) // 4 + 1))[: len(payload)]
    body = int.from_bytes(payload, "big") ^ int.from_bytes(stretched, "big")
    return head + mask + body.to_bytes(len(payload), "big")


class Wire:
    """One TCP connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)

    async def send(self, data: bytes) -> None:
        """Send; what the other end thinks of it shows when reading."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            pass

    async def answer(self) -> Answer:
        async with asyncio.timeout(GUARD):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines[1:] if line)
            }
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
            return Answer(int(re.match(r"HTTP/1\.[01] (\d+)", lines[0])[1]), headers, body)

    async def rest(self) -> bytes:
        """Everything until the other end closes."""
        async with asyncio.timeout(GUARD):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer()

    # --- WebSocket ---

    async def upgrade(self, key: str | None, path: str = "/v1/conversations/new") -> None:
        answer = await self.ask(upgrade(key, path=path))
        assert answer.status == 101, answer

    async def frame(self) -> tuple[int, bytes]:
        """The next frame of the server: opcode and payload."""
        async with asyncio.timeout(GUARD):
            first, second = await self.reader.readexactly(2)
            assert first & 0xF0 == 0x80, "servers send whole frames"
            assert second < 128, "servers do not mask"
            length = second
            if second == 126:
                (length,) = struct.unpack(">H", await self.reader.readexactly(2))
            elif second == 127:
                (length,) = struct.unpack(">Q", await self.reader.readexactly(8))
            return first & 0x0F, await self.reader.readexactly(length)

    async def message(self) -> Any:
        """The next JSON message; what comes between is skipped."""
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                raise AssertionError(f"closed instead: {ended(payload)}")
            if opcode == TEXT:
                return msgspec.json.decode(payload)

    async def send_json(self, message: Any) -> None:
        await self.send(frame(TEXT, msgspec.json.encode(message)))

    async def call(self, method: str, id: int | str = 1, **params: Any) -> Any:
        """The answer to a call: the whole message."""
        await self.send_json({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
        while (message := await self.message()).get("id") != id:
            pass
        return message

    async def initialize(self, **params: Any) -> Any:
        given = {"protocol_version": 1, "client": {"name": "test", "version": "0"}, **params}
        return await self.call("initialize", "init", **given)

    async def ended(self) -> Ended:
        """How the server closes; whatever else it still sends is skipped."""
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                return ended(payload)


def ended(payload: bytes) -> Ended:
    return Ended(int.from_bytes(payload[:2], "big"), payload[2:].decode())


def call(method: str, id: Any = 1, **params: Any) -> bytes:
    """A call as JSON."""
    return msgspec.json.encode({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
