"""A client freezes: it holds up nobody, it is let go of, and it has lost nothing when it wakes up."""

from __future__ import annotations

import asyncio
import re
import signal
import sys

import aiohttp
import psutil
import pytest

from tests.chaos import seed
from tests.chaos.checker import Violation, broken_rules
from tests.chaos.client import Session, Subscriber, Writer
from tests.chaos.conftest import Case
from tests.chaos.history import Left
from tests.chaos.proxy import Proxy
from tests.chaos.server import KEY, Server
from tests.chaos.storm import settled

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

TEXT = "x" * 200_000
MESSAGES = 300
BUDGET = {"limits_queue_bytes": 1 << 20, "slow_reader_seconds": 1}
MEMORY = MESSAGES * len(TEXT)
"""The conversation keeps its messages in memory once; a frozen client does not keep them there once more."""


async def freeze(case: Case, mutant: str = "") -> list[Violation]:
    """One client reads nothing while others go on; what the checker says, memory and closed readers included."""
    async with case.server(mutant=mutant, **BUDGET) as server:
        assert await server.start()
        async with Session.open(server.port) as session:
            id = session.introduction["conversation"]
        process = psutil.Process(server.pid)
        async with (
            Proxy(server) as proxy,
            Subscriber("frozen", proxy, id, case.history) as frozen,
            Subscriber("healthy", server, id, case.history) as healthy,
            Writer("writer", server, id, case.history) as writer,
        ):
            await frozen.connected()
            proxy.hold()
            await writer.effect("send_message", text="to begin with")
            before = process.memory_info().rss
            for _ in range(MESSAGES):
                await writer.effect("send_message", text=TEXT)
            grown = process.memory_info().rss - before - MEMORY
            await settled(healthy)
            if grown > MEMORY // 2:
                case.history.add(Left(what=f"{grown >> 20} MiB for a client that does not read"))
            if not await slow_readers(server):
                case.history.add(Left(what="a client that does not read, and is not let go of"))
            proxy.cut(reset=True)
            proxy.flow()
            await settled(frozen)
        await server.stop()
        return await case.violations(server)


async def slow_readers(server: Server) -> float:
    """How many the server has let go of."""
    url = f"http://127.0.0.1:{server.port}/metrics"
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http,
        http.get(url) as answer,
    ):
        found = re.search(r"^agent_server_slow_readers_total (\S+)", await answer.text(), re.MULTILINE)
        return float(found[1])


async def test_a_frozen_client_costs_little_and_loses_nothing(case):
    assert not await freeze(case)


async def test_a_frozen_client_finds_a_build_with_endless_queues(case):
    assert 8 in broken_rules(await freeze(case, "unbounded_queue"))


async def test_a_client_that_was_stopped_is_let_go_of_and_sees_everything_when_it_goes_on(case):
    async with case.server(**BUDGET) as server:
        assert await server.start()
        async with Session.open(server.port) as session:
            id = session.introduction["conversation"]
        witness = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.witness", str(server.port), id),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with (
                Subscriber("healthy", server, id, case.history) as healthy,
                Writer("writer", server, id, case.history) as writer,
            ):
                await writer.effect("send_message", text="to begin with")
                assert await witness.stdout.readline() == b"1\n"
                witness.send_signal(signal.SIGSTOP)
                for _ in range(MESSAGES // 10):
                    await writer.effect("send_message", text=TEXT)
                head = await settled(healthy)
                await server.said("session_ended", code=4408)
                witness.send_signal(signal.SIGCONT)
                seen = [int(await witness.stdout.readline()) for _ in range(head - 1)]
            assert seen == list(range(2, head + 1))
        finally:
            witness.kill()
            await witness.wait()
        await server.stop()
        await case.judge(server)
