"""Clients that read slowly or not at all, and connections that die without a word: what becomes of them,
of their events, and of everybody else."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

from agent_sdk.ids import new_id
from agent_sdk.protocol.specs import Limits
from tests.server.wire import CLOSE, TEXT, Wire, ended

BUDGET = {"limits": Limits(queue_bytes=1 << 20), "slow_reader_seconds": 0.5}
LARGE = 100_000
MANY = 60
"""Large events that are more than the budget and all buffers of a connection hold."""


async def write_events(wire: Wire, count: int, size: int = LARGE) -> int:
    """Write events of this size; returns the seq of the last."""
    for number in range(count):
        await wire.call("set_title", number, op_id=new_id(), tags={"x": f"{number:06}" + "x" * size})
    return (await wire.call("conversation.state", "state"))["result"]["head_seq"]


async def until_closed(wire: Wire) -> tuple[list[int], int]:
    """The seqs of all events that still come, and the close code."""
    seqs = []
    while True:
        opcode, payload = await wire.frame()
        if opcode == CLOSE:
            return seqs, ended(payload).code
        message = json.loads(payload) if opcode == TEXT else {}
        seqs += [event["seq"] for event in message.get("params", {}).get("events", [])]


async def until_seq(wire: Wire, seq: int) -> list[int]:
    """The seqs of the events up to this one."""
    seqs: list[int] = []
    while not seqs or seqs[-1] < seq:
        seqs += [event["seq"] for event in (await wire.message()).get("params", {}).get("events", [])]
    return seqs


@asynccontextmanager
async def silent_after(server, silent: asyncio.Event):
    """A proxy that forwards until the event is set, and from then on holds everything back, without a word."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if not silent.is_set():
                writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
        finally:
            back.close()
            writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as listener:
        yield listener.sockets[0].getsockname()[1]


async def test_a_frozen_client_is_closed_with_4408_and_resumes_without_loss(start):
    async with start(**BUDGET) as server, server.session() as writer:
        path = f"/v1/conversations/{writer.answered['conversation']}"
        async with server.session(path, resume={"after_seq": 0}) as frozen:
            head = await write_events(writer, MANY)
            assert (await server.log.until("session_ended"))["code"] == 4408
            # When it wakes up, it finds out why.
            seqs, code = await until_closed(frozen)
            assert code == 4408
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < head
        async with server.session(path, resume={"after_seq": len(seqs)}) as back:
            assert seqs + await until_seq(back, head) == list(range(1, head + 1))
        async with server.http() as http:
            page = await (await http.get("/metrics")).text()
        assert "agent_server_slow_readers_total 1.0" in page


async def test_a_client_that_falls_behind_and_reads_again_in_time_stays_and_misses_nothing(start):
    async with start(limits=BUDGET["limits"]) as server, server.session() as writer:
        path = f"/v1/conversations/{writer.answered['conversation']}"
        async with server.session(path, resume={"after_seq": 0}) as slow:
            head = await write_events(writer, MANY)
            assert await until_seq(slow, head) == list(range(1, head + 1))
            last = await write_events(writer, 1)
            assert await until_seq(slow, last) == [last]


async def test_a_frozen_client_keeps_no_one_waiting(start):
    async with start(**BUDGET) as server, server.session() as writer:
        path = f"/v1/conversations/{writer.answered['conversation']}"
        async with (
            server.session(path, resume={"after_seq": 0}),
            server.session(path, resume={"after_seq": 0}) as healthy,
        ):
            reading = asyncio.create_task(until_seq(healthy, 1 + MANY))
            assert await write_events(writer, MANY) == 1 + MANY
            assert await reading == list(range(1, MANY + 2))


async def test_a_client_that_never_answers_a_ping_is_cut_off(start):
    async with start(heartbeat_seconds=0.2) as server, server.session():
        assert (await server.log.until("session_ended"))["code"] == 1006


async def test_a_connection_that_holds_everything_back_is_found_by_the_server(start):
    silent = asyncio.Event()
    async with (
        start(heartbeat_seconds=0.2) as server,
        silent_after(server, silent) as port,
        await Wire.open(port) as wire,
    ):
        await wire.upgrade(server.key)
        await wire.initialize()
        silent.set()
        assert (await server.log.until("session_ended"))["code"] == 1006
