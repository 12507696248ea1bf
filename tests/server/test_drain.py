"""The end of a server with many clients, some of which neither read nor answer."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack

from agent_sdk.ids import new_id
from tests.server.test_serve import started
from tests.server.wire import Wire

FROZEN = 5
LISTENING = 500
LARGE = 100_000


async def test_five_hundred_clients_and_frozen_ones_are_let_go_in_time(tmp_path):
    """Within the 25 seconds that whoever stops a server usually gives it."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(started(tmp_path / "data"))
        writer = await stack.enter_async_context(server.session())
        path = f"/v1/conversations/{writer.answered['conversation']}"
        for _ in range(FROZEN):
            wire = await stack.enter_async_context(await Wire.open(server.port))
            await wire.upgrade(server.key, path)
            await wire.initialize(resume={"after_seq": 0})
        for number in range(20):  # more than the buffers of a connection hold
            await writer.call("set_title", number, op_id=new_id(), tags={"x": f"{number:02}" + "x" * LARGE})
        wires = []
        for _ in range(LISTENING):
            wires.append(await stack.enter_async_context(await Wire.open(server.port)))
            await wires[-1].upgrade(server.key, path)
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(25):
            codes = {(await wire.ended()).code for wire in wires}
            assert await server.process.wait() == 0
        assert codes == {4503}


async def test_the_close_says_when_to_come_back(tmp_path):
    async with started(tmp_path / "data") as server, server.session() as wire:
        server.process.send_signal(signal.SIGTERM)
        over = await wire.ended()
        assert over.code == 4503
        assert over.reason.endswith("retry_after_ms=250")
