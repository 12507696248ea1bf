"""The network breaks, slices and stalls connections; what clients see stays the same."""

from __future__ import annotations

import asyncio
import signal

import aiohttp
import psutil
import pytest

from tests.chaos import seed
from tests.chaos.client import Session, Subscriber, Writer
from tests.chaos.history import History, Saw
from tests.chaos.proxy import Proxy
from tests.chaos.server import KEY, Server
from tests.chaos.storm import settled, talked

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

STEP = seed.times(97, 1)
"""Bytes between two cuts."""


def transcript(history: History) -> list[tuple[int, str]]:
    return [(record.seq, record.digest) for record in history.records if isinstance(record, Saw)]


async def watched(proxy: Proxy, id: str, head: int) -> list[tuple[int, str]]:
    """What one subscriber sees until it has seen everything."""
    history = History()
    async with Subscriber("subscriber", proxy, id, history) as subscriber:
        await subscriber.reach(head)
    return transcript(history)


async def test_a_session_cut_at_any_byte_is_seen_alike(case):
    async with case.server() as server:
        assert await server.start()
        id, head = await talked(server, case.history, 40, "x" * 700)
        async with Proxy(server) as proxy:
            whole = await watched(proxy, id, head)
            length = proxy.passed["down"]
            assert len(whole) == head and length > 30_000
            for cut in range(1, length, STEP):
                proxy.cuts = [("down", cut)]
                assert await watched(proxy, id, head) == whole, f"cut after {cut} bytes"
                assert not proxy.cuts
        await server.stop()


async def test_a_call_cut_at_any_byte_is_made_once(case):
    async with case.server() as server:
        assert await server.start()
        async with Session.open(server.port) as session:
            id = session.introduction["conversation"]
        async with Proxy(server) as proxy, Subscriber("subscriber", server, id, case.history) as subscriber:
            for cut in range(1, 1500, 29):
                for way in ("up", "down"):
                    proxy.cuts = [(way, cut)]
                    async with Writer(f"writer-{way}-{cut}", proxy, id, case.history) as writer:
                        await writer.effect("send_message", text=f"{way} {cut}")
            await settled(subscriber)
        await server.stop()
        await case.judge(server)


async def test_a_network_that_delivers_single_bytes_delivers_everything(case):
    async with case.server() as server:
        assert await server.start()
        id, head = await talked(server, case.history, 5)
        async with Proxy(server) as proxy:
            whole = await watched(proxy, id, head)
            proxy.piece = 1
            assert await watched(proxy, id, head) == whole
        await server.stop()


async def test_reconnects_lose_nothing_and_cost_the_server_nothing(case):
    rounds = seed.times(1000, 10_000)
    async with case.server() as server:
        assert await server.start()
        id, _ = await talked(server, case.history, 5)
        async with Proxy(server) as proxy, Subscriber("subscriber", proxy, id, case.history) as subscriber:
            process, after = psutil.Process(server.pid), {}
            async with Writer("writer", server, id, case.history) as writer:
                for nth in range(rounds):
                    if nth % 10 == 0:
                        await writer.effect("send_message", text=f"message {nth}")
                    await subscriber.connected()
                    if nth in (rounds // 2, rounds - 1):
                        after[nth] = await size(process, server)
                    proxy.cut(reset=case.chance.random() < 0.5)
                    await subscriber.disconnected()
                await settled(subscriber)
        await server.stop()
        await case.judge(server)
    (files, memory, tasks), (files_later, memory_later, tasks_later) = after.values()
    assert files_later <= files + 3
    assert tasks_later <= tasks + 8  # those of a connection that is just being cut
    assert memory_later <= memory * 1.02 + (1 << 20)


async def size(process: psutil.Process, server: Server) -> tuple[int, int, int]:
    """Open descriptors, resident bytes and tasks of a server."""
    url = f"http://{server.host}:{server.port}"
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(url, headers=headers) as http, http.get("/metrics") as answer:
        page = await answer.text()
    tasks = next(line.split()[1] for line in page.splitlines() if line.startswith("agent_server_tasks "))
    return process.num_fds(), process.memory_info().rss, round(float(tasks))


async def test_a_frozen_server_is_waited_for(case):
    async with case.server() as server:
        assert await server.start()
        id, _ = await talked(server, case.history, 1)
        async with (
            Subscriber("subscriber", server, id, case.history) as subscriber,
            Writer("writer", server, id, case.history) as writer,
        ):
            server.signal(signal.SIGSTOP)
            waiting = asyncio.create_task(writer.effect("send_message", text="are you there?"))
            await asyncio.wait([waiting], timeout=1)
            assert not waiting.done()
            server.signal(signal.SIGCONT)
            assert await waiting
            await settled(subscriber)
        await server.stop()
        await case.judge(server)


async def test_a_connection_that_went_silent_is_given_up_and_resumed(case):
    async with case.server(heartbeat_seconds=1) as server:
        assert await server.start()
        id, _ = await talked(server, case.history, 1)
        async with Proxy(server) as proxy, Subscriber("subscriber", proxy, id, case.history) as subscriber:
            session = await subscriber.connected()
            proxy.hold()
            async with Writer("writer", server, id, case.history) as writer:
                await writer.effect("send_message", text="nobody hears this yet")
            await server.said("session_ended", connection=session.introduction["connection_id"])
            proxy.cut(reset=True)
            proxy.flow()
            await settled(subscriber)
        await server.stop()
        await case.judge(server)
