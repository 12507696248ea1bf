"""Calls to a box through a server: once each, whatever is killed meanwhile, with all their bytes."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.methods import (
    Describe,
    Execute,
    Executed,
)
from agent_sdk.remote.connection import connect
from agent_sdk.rpc.peer import Peer
from tests.server.wire import GUARD


class Server:
    """A server process that can be killed, and its successors on the same data folder."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.conversation = new_id()
        self._process: asyncio.subprocess.Process | None = None
        self._url = self._key = ""

    async def start(self) -> None:
        command = ("-m", "agent_server", "serve", "--json", "--port", "0", "--data", str(self.data))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        ready = json.loads(await self._process.stdout.readline())
        self._url, self._key = ready["url"], Path(ready["api_key_file"]).read_text().strip()

    async def stop(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        await self._process.wait()

    async def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        await self.stop(number)
        await self.start()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Peer]:
        """A connection that is lost with its server, and does not come back by itself."""
        async with connect(self._url, self._key, conversation=self.conversation) as connection:
            yield connection.peer

    async def root(self) -> Path:
        async with self.connected() as peer:
            return Path((await peer.call(Describe())).root)


@pytest.fixture
async def server(tmp_path, monkeypatch):
    running = Server(tmp_path / "data")
    await running.start()
    async with connect(running._url, running._key) as connection:
        running.conversation = connection.answer.conversation
    async with asyncio.timeout(3 * GUARD):
        yield running
    monkeypatch.setenv("AGENT_SERVER_BOXES_ON_STOP", "end")
    await running.restart(signal.SIGTERM)
    await running.stop(signal.SIGTERM)


async def execute(peer: Peer, call: Execute) -> tuple[Executed, bytes, bytes]:
    """Make the call with streams of its own; returns the answer and what came over them."""
    async with AsyncExitStack() as stack:
        out, err = [await stack.enter_async_context(peer.open_reader()) for _ in range(2)]
        fields = {name: getattr(call, name) for name in call.__struct_fields__}
        answer = await peer.call(
            Execute(**{**fields, "stdout": out.channel, "stderr": err.channel, "follow": True})
        )
        return answer, await received(out), await received(err)


async def received(reader) -> bytes:
    return b"".join([chunk.data async for chunk in reader])


LINES = "".join(f"{number}\n" for number in range(1, 21)).encode()


async def test_a_command_goes_on_while_its_server_is_dead_and_its_end_is_told_by_the_next_one(server):
    root = await server.root()
    command = "echo run >>runs; for i in $(seq 20); do echo $i; sleep 0.05; done; exit 3"
    call = Execute(op_id=new_id(), shell=command)
    async with server.connected() as peer, peer.open_reader() as out, peer.open_reader() as err:
        fields = {"stdout": out.channel, "stderr": err.channel, "follow": True}
        calling = asyncio.ensure_future(peer.call(Execute(op_id=call.op_id, shell=command, **fields)))
        assert (await anext(out)).data.startswith(b"1\n")
        await server.restart()
        with pytest.raises(ConnectionError):
            await calling
    async with server.connected() as peer:
        answer, said, _ = await execute(peer, call)
        assert (answer.status, answer.exit_code, said) == ("exited", 3, LINES)
        assert await execute(peer, call) == (answer, said, b"")
    assert (root / "runs").read_text() == "run\n"
