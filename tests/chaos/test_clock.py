"""The clock of the machine jumps: nothing but the times that are shown follows it."""

from __future__ import annotations

import asyncio

import pytest

from agent_sdk.ids import new_id
from tests.chaos import seed
from tests.chaos.client import Caller
from tests.chaos.storm import traffic

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

JUMPS = ["-1h", "+1h", "+400d", "-20000d", "+9000d", "+0"]


async def test_a_clock_that_jumps_changes_nothing_but_the_times_that_are_shown(case, tool):
    tool("faketime")
    clock = case.folder / "clock"
    clock.write_text("+0\n")
    fake = {
        "LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    async with case.server() as server:
        assert await server.start(**fake)
        async with traffic(server, case.history) as clients:
            id = clients.conversations[0]
            async with Caller("client", server, id, case.history) as client:
                op_id = new_id()
                shell = case.effect(op_id, "sleep 2")
                command = asyncio.create_task(
                    client.effect("execute", op_id=op_id, shell=shell, timeout_ms=60_000)
                )
                for jump in JUMPS:
                    clock.write_text(f"{jump}\n")
                    await case.history.more(4)
                result = await command
                assert (result["status"], result["exit_code"]) == ("exited", 0)
                await client.ask("execute", op_id=op_id, shell=shell, timeout_ms=60_000)
            await server.kill()
            assert await server.start(**fake)
            await clients.finish()
        case.note_effects()
        await server.stop()
        await case.judge(server)
