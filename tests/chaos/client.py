"""Clients on the bare wire: writers that repeat a call until it is answered, and subscribers that resume.

They are not the product's client, so that they cannot share its mistakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec

from agent_sdk.ids import new_id
from tests.chaos.history import PATIENCE, Begins, Called, History, Reached, Saw, digest
from tests.chaos.server import KEY
from tests.server.wire import BINARY, CLOSE, PING, PONG, TEXT, Wire, frame, upgrade

MESSAGE = 4
LAST = 1
BACKOFF = 0.02
AGENT = {"llm": {"kind": "scripted", "steps": [{"step": "say", "text": "ok"}], "repeat": True}}

OnNotice = Callable[[str, dict[str, Any]], None]


class Place(Protocol):
    """Where a server is, and whether it accepts connections just now."""

    host: str
    port: int
    up: asyncio.Event


class Lost(ConnectionError):
    """The connection has ended; `code` is that of its close frame, 1006 when there was none."""

    def __init__(self, code: int = 1006) -> None:
        super().__init__(f"the connection was lost: {code}")
        self.code = code


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.kind: str = error["data"]["kind"]
        self.retryable: bool = error["data"]["retryable"]


class Output:
    """What came of a command's output, over as many connections as it took."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.jumps: list[tuple[int, int]] = []
        """Where it did not go on where it had stopped."""
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []

    def take(self, offset: int, data: bytes) -> None:
        """More came."""
        if offset != len(self.data):
            self.jumps.append((len(self.data), offset))
        self.data.extend(data)
        for lines, waiter in self._awaited:
            if self.data.count(b"\n") >= lines and not waiter.done():
                waiter.set_result(None)

    async def has(self, lines: int) -> None:
        """Wait until it has so many lines."""
        if self.data.count(b"\n") >= lines:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._awaited.append((lines, waiter))
        async with asyncio.timeout(PATIENCE):
            await waiter


class Session:
    """One WebSocket. Calls may run at the same time; notices go to `on_notice`, bytes of streams to `streams`."""

    def __init__(self, wire: Wire, on_notice: OnNotice | None) -> None:
        self.wire = wire
        self.streams: dict[int, Output] = {}
        self.introduction: dict[str, Any] = {}
        self._next_channel = 1
        self._on_notice = on_notice
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._pieces: dict[int, bytearray] = {}
        self.lost: asyncio.Future[Lost] = asyncio.get_running_loop().create_future()
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        port: int,
        conversation: str = "new",
        *,
        host: str = "127.0.0.1",
        on_notice: OnNotice | None = None,
        **initialize: Any,
    ) -> AsyncIterator[Session]:
        """Connect and initialise.

        Raises:
            Lost, OSError: there is no server, or it went away.
            Refused: it does not want us.
        """
        try:
            wire = Wire(*await asyncio.open_connection(host, port))
        except OSError:
            raise Lost from None
        async with wire:
            session = cls(wire, on_notice)
            try:
                answer = await session._upgraded(conversation)
                if answer is not None:
                    raise Refused(answer["error"])
                session._reading = asyncio.create_task(session._read())
                params = {"protocol_version": 1, "client": {"name": "chaos", "version": "0"}, **initialize}
                session.introduction = await session.call("initialize", **params)
                yield session
            finally:
                if session._reading is not None:
                    session._reading.cancel()
                    await asyncio.gather(session._reading, return_exceptions=True)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a call.

        Raises:
            Lost: no answer will come on this connection.
            Refused: the answer is an error.
        """
        if self.lost.done():
            raise self.lost.result()
        id = new_id()
        answer = self._waiting[id] = asyncio.get_running_loop().create_future()
        await self.wire.send_json({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
        message = await answer
        if "error" in message:
            raise Refused(message["error"])
        return message["result"]

    def follow(self, output: Output) -> dict[str, Any]:
        """The params of a command whose output goes on where it stopped."""
        out, err = self._next_channel, self._next_channel + 2
        self._next_channel += 4
        self.streams[out] = output
        return {"stdout": out, "stderr": err, "follow": True, "stdout_since": len(output.data)}

    def channel(self, output: Output) -> int:
        """A number for a stream whose bytes this takes."""
        self._next_channel += 2
        self.streams[self._next_channel] = output
        return self._next_channel

    async def _upgraded(self, conversation: str) -> dict[str, Any] | None:
        try:
            answer = await self.wire.ask(upgrade(KEY, path=f"/v1/conversations/{conversation}"))
        except (ConnectionError, asyncio.IncompleteReadError):
            raise Lost from None
        return None if answer.status == 101 else answer.json

    async def _read(self) -> None:
        code = 1006
        try:
            while True:
                opcode, payload = await self._frame()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")
                    return
                if opcode == PING:
                    await self.wire.send(frame(PONG, payload))
                elif opcode == TEXT:
                    self._take(payload)
                elif opcode == BINARY:
                    self._take_binary(payload)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            lost = Lost(code)
            self.lost.set_result(lost)
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(lost)
            self._waiting.clear()

    async def _frame(self) -> tuple[int, bytes]:
        reader = self.wire.reader
        first, length = await reader.readexactly(2)
        if length >= 126:
            length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8), "big")
        return first & 0x0F, await reader.readexactly(length)

    def _take_binary(self, payload: bytes) -> None:
        kind, flags, stream = (
            payload[1],
            int.from_bytes(payload[2:4], "big"),
            int.from_bytes(payload[4:8], "big"),
        )
        if kind == MESSAGE:
            self._pieces.setdefault(stream, bytearray()).extend(payload[16:])
            if flags & LAST:
                self._take(bytes(self._pieces.pop(stream)))
        elif kind == 0 and (output := self.streams.get(stream)) is not None:
            output.take(int.from_bytes(payload[8:16], "big"), payload[16:])

    def _take(self, data: bytes) -> None:
        message = msgspec.json.decode(data)
        if "method" not in message:
            answer = self._waiting.pop(message["id"], None)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif self._on_notice is not None:
            self._on_notice(message["method"], message.get("params", {}))


class Caller:
    """A client of one conversation: it connects when there is a server, and repeats what was not answered."""

    def __init__(self, name: str, place: Place, conversation: str, history: History) -> None:
        self.name = name
        self.conversation = conversation
        self._place = place
        self._history = history
        self._session: Session | None = None
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self):
        self._task = asyncio.create_task(self._stay())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def effect(
        self, method: str, *, op_id: str = "", output: Output | None = None, **params: Any
    ) -> dict[str, Any] | None:
        """Call until there is an answer, always with the same op_id; recorded. None: refused, or given up.

        With `output` the call is a command whose standard output is followed.
        """
        op_id = op_id or new_id()
        loop = asyncio.get_running_loop()
        begun, tries, result, error, outcome = loop.time(), 0, None, "", "none"
        try:
            async with asyncio.timeout(PATIENCE):
                while outcome == "none":
                    await self._ready.wait()
                    session, tries = self._session, tries + 1
                    try:
                        followed = {} if output is None else session.follow(output)
                        result = await session.call(method, op_id=op_id, **params, **followed)
                        outcome = "ok"
                    except Lost:
                        self._gone(session)
                    except Refused as exc:
                        if exc.kind == "overloaded":
                            await asyncio.wait({session.lost}, timeout=1)
                        else:
                            outcome, error = "error", exc.kind
        except TimeoutError:
            error = "gave up"
        finally:
            self._history.add(
                Called(
                    client=self.name,
                    conversation=self.conversation,
                    op_id=op_id,
                    kind=method,
                    digest=digest(params),
                    begun=begun,
                    ended=loop.time(),
                    tries=tries,
                    outcome=outcome,
                    error=error,
                    seq=(result or {}).get("seq", 0),
                    status=(result or {}).get("status", ""),
                )
            )
        return result

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Call what changes nothing, until there is an answer."""
        async with asyncio.timeout(PATIENCE):
            while True:
                session = await self.connected()
                try:
                    return await session.call(method, **params)
                except Lost:
                    self._gone(session)

    async def connected(self) -> Session:
        """Wait until there is a connection."""
        async with asyncio.timeout(PATIENCE):
            await self._ready.wait()
        return self._session

    async def disconnected(self) -> None:
        """Wait for the end of the present connection."""
        session = self._session
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait({session.lost})
        self._gone(session)

    def _gone(self, session: Session) -> None:
        if self._session is session:
            self._ready.clear()

    async def _stay(self) -> None:
        while True:
            await self._place.up.wait()
            try:
                async with Session.open(
                    self._place.port,
                    self.conversation,
                    host=self._place.host,
                    on_notice=self._notice,
                    **self._initialize(),
                ) as session:
                    self._session = session
                    await self._connected(session)
                    self._ready.set()
                    await asyncio.wait({session.lost})
            except (Lost, Refused):
                await asyncio.sleep(BACKOFF)
            self._ready.clear()

    def _initialize(self) -> dict[str, Any]:
        return {}

    async def _connected(self, session: Session) -> None:
        """A connection is there, and not used yet."""

    def _notice(self, method: str, params: dict[str, Any]) -> None:
        """A notice came."""


class Writer(Caller):
    """Sends messages, one after the other, each until it is answered."""

    written = 0

    async def _connected(self, session: Session) -> None:
        try:
            await session.call("conversation.configure", op_id=new_id(), agent=AGENT)
        except Refused as exc:
            if exc.kind != "storage_full":  # then its messages are refused, too, and it hears why
                raise

    async def write(self, until: asyncio.Event) -> None:
        """Write until told to stop."""
        while not until.is_set():
            self.written += 1
            await self.effect("send_message", text=f"{self.name} {self.written}")


class Subscriber(Caller):
    """Records each event as its callback sees it, and resumes after the last one."""

    def __init__(self, name: str, place: Place, conversation: str, history: History) -> None:
        super().__init__(name, place, conversation, history)
        self.epoch: str | None = None
        self.seq = 0
        self.resets = 0
        self._news = asyncio.Event()
        self._begins()

    async def reach(self, seq: int) -> None:
        """Wait until it has seen this event; recorded as what it must see."""
        self._history.add(Reached(client=self.name, conversation=self.conversation, seq=seq))
        async with asyncio.timeout(PATIENCE):
            while self.seq < seq:
                await self.news(PATIENCE)

    async def news(self, seconds: float) -> None:
        """Wait for events, but not for long."""
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()

    async def head(self) -> int:
        """The last seq of the conversation, as the server says."""
        return (await self.ask("conversation.state"))["head_seq"]

    def _begins(self) -> None:
        self._history.add(Begins(client=self.name, conversation=self.conversation, after=self.seq))

    def _initialize(self) -> dict[str, Any]:
        return {"resume": {"epoch": self.epoch, "after_seq": self.seq}}

    def _notice(self, method: str, params: dict[str, Any]) -> None:
        if method == "sync.reset":
            self.epoch, self.seq = params["epoch"], params["from_seq"] - 1
            self.resets += 1
            self._begins()
        elif method == "events":
            self.epoch = params["epoch"]
            for event in params["events"]:
                self.seq = event["seq"]
                self._history.add(
                    Saw(
                        client=self.name,
                        conversation=self.conversation,
                        epoch=self.epoch,
                        seq=self.seq,
                        digest=digest(event),
                    )
                )
            self._news.set()
