"""The network between two machines goes silent: no packet arrives, and nobody is told."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import pytest

from tests.chaos import seed
from tests.chaos.client import Session, Subscriber, Writer
from tests.chaos.disk import run
from tests.chaos.storm import settled

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(seed.LIMIT),
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
]


class Wires(NamedTuple):
    """A namespace of its own, and the two wires that lead to it."""

    namespace: str
    first: str
    second: str


@asynccontextmanager
async def another_machine() -> AsyncIterator[Wires]:
    """A network namespace that is reached at 10.213.1.2 and 10.213.2.2, over a wire each."""
    name = f"chaos{secrets.token_hex(3)}"
    async with AsyncExitStack() as stack:
        await run("ip", "netns", "add", name)
        stack.push_async_callback(run, "ip", "netns", "del", name)
        for nth in (1, 2):
            wire = f"{name}{nth}"
            await run("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth", "netns", name)
            await run("ip", "-n", name, "link", "set", "eth", "name", f"eth{nth}")
            await run("ip", "addr", "add", f"10.213.{nth}.1/24", "dev", wire)
            await run("ip", "-n", name, "addr", "add", f"10.213.{nth}.2/24", "dev", f"eth{nth}")
            await run("ip", "link", "set", wire, "up")
            await run("ip", "-n", name, "link", "set", f"eth{nth}", "up")
        await run("ip", "-n", name, "link", "set", "lo", "up")
        yield Wires(name, f"{name}1", f"{name}2")


class Address:
    """The server, seen over one of the wires; a client.Place."""

    def __init__(self, server, host: str) -> None:
        self.host = host
        self.port = server.port
        self.up = server.up


async def test_a_wire_that_goes_silent_is_noticed_and_nothing_is_missed_later(case, tool):
    tool("ip")
    async with (
        another_machine() as wires,
        case.server(host="0.0.0.0", heartbeat_seconds=1, allow_hosts="*") as server,
    ):
        assert await server.start("ip", "netns", "exec", wires.namespace)
        broken, whole = Address(server, "10.213.1.2"), Address(server, "10.213.2.2")
        async with Session.open(whole.port, host=whole.host) as session:
            id = session.introduction["conversation"]
        async with (
            Subscriber("subscriber", broken, id, case.history) as subscriber,
            Writer("writer", whole, id, case.history) as writer,
        ):
            connection = (await subscriber.connected()).introduction["connection_id"]
            await run("ip", "link", "set", wires.first, "down")
            for nth in range(10):
                await writer.effect("send_message", text=f"message {nth}")
            await server.said("session_ended", connection=connection)
            await run("ip", "link", "set", wires.first, "up")
            await settled(subscriber)
        await server.stop()
        await case.judge(server)
