"""The disk fails, fills up, or forgets: no acknowledgement is ever wrong, and nothing that is damaged is served."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from agent_sdk.ids import new_id
from tests.chaos import seed
from tests.chaos.client import Caller, Subscriber, Writer
from tests.chaos.disk import small
from tests.chaos.history import Final, History
from tests.chaos.server import KEY, Server, final_logs
from tests.chaos.storm import settled, talked, traffic
from tests.chaos.syscalls import attached

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

IO_ERROR = 74
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")


@pytest.fixture
def place() -> Iterator[Path]:
    """Where file systems are mounted."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.parametrize("when", [3, 8, 20] if seed.TIER == "pr" else range(1, 51))
async def test_a_failed_fsync_ends_the_server_and_is_never_acknowledged(case, tool, when):
    tool("strace")
    async with case.server() as server:
        assert await server.start()
        async with traffic(server, case.history) as clients:
            await case.history.more(5)
            async with attached(server, "fsync,fdatasync", f"error=EIO:when={when}"):
                assert await server.ended() == IO_ERROR
            await server.restart()
            await clients.finish()
        await server.stop()
        await case.judge(server)


async def test_a_full_disk_makes_conversations_read_only_until_there_is_room(case, tool):
    tool("strace")
    async with case.server() as server:
        assert await server.start()
        id, head = await talked(server, case.history, 3)
        async with Writer("writer", server, id, case.history) as writer:
            await writer.connected()
            op_id = new_id()
            async with attached(server, "pwrite64", "error=ENOSPC"):
                await writer.effect("send_message", op_id=op_id, text="no room for this")
                assert case.history.last_call.error == "storage_full"
                assert await everything_is_read(server, id) == head
            assert await writer.effect("send_message", op_id=op_id, text="no room for this")
        await server.stop()
        await case.judge(server)


@ROOT_ONLY
async def test_a_small_disk_fills_up_and_deleting_makes_room(case, place, tool):
    tool("mount")
    async with small(place / "disk", 6 << 20) as disk, case.server(data=disk / "data") as server:
        assert await server.start()
        other, _ = await talked(server, case.history, 20, "x" * 100_000)
        id, _ = await talked(server, case.history, 1)
        async with Writer("writer", server, id, case.history) as writer:
            while await writer.effect("send_message", text="x" * 100_000):
                pass
            assert case.history.last_call.error == "storage_full"
            assert await everything_is_read(server, id) > 1
            async with Caller("remover", server, other, case.history) as remover:
                assert await remover.effect("conversation.delete") is not None
            assert await writer.effect("send_message", text="there is room again")
        await server.stop()
        await case.judge(server)


async def flip(case: Any, text: bytes, mutant: str = "") -> list[dict[str, Any]] | None:
    """Change a letter of a message in the file; what the server then serves of the conversation, None: nothing."""
    async with case.server(mutant=mutant) as server:
        assert await server.start()
        id, _ = await talked(server, case.history, 3, "the quick brown fox")
        healthy, head = await talked(server, case.history, 3)
        await server.stop()
        change(server.data / "log.db", text)
        assert await server.start(), "a damaged conversation keeps the server from starting"
        assert len(await served(server, healthy)) == head
        found = await served(server, id)
        await server.stop()
        return found


def change(file: Path, text: bytes) -> None:
    """Flip one bit in each place that has this text: pages that are not used any more have it, too."""
    flipped = bytes([text[0] ^ 1]) + text[1:]
    file.write_bytes(file.read_bytes().replace(text, flipped))


async def served(server: Server, id: str) -> list[dict[str, Any]] | None:
    """The events of a conversation as the server gives them; None when it refuses to."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http:
        url = f"http://127.0.0.1:{server.port}/v1/conversations/{id}/events"
        async with http.get(url) as answer:
            said = await answer.json()
            if answer.status != 200:
                assert said["error"]["data"]["kind"] == "conversation_damaged", said
                return None
            return said["events"]


async def test_a_flipped_bit_is_never_served(case):
    found = await flip(case, b"quick")
    assert found is None or "puick" not in str(found)


async def test_a_flipped_bit_is_served_by_a_build_that_does_not_look(case):
    assert "puick" in str(await flip(case, b"quick", "no_proof"))


async def test_no_flipped_bit_changes_what_is_served_or_stops_the_others(case):
    async with case.server() as server:
        assert await server.start()
        async with traffic(server, case.history) as clients:
            await case.history.more(40)
            await clients.finish()
        await server.stop()
        whole = await final_logs(server.data / "log.db")
        image = (server.data / "log.db").read_bytes()
        for nth in range(seed.times(4, 200, 2000)):
            data = bytearray(image)
            place = case.chance.randrange(100, len(data))  # what is before says that it is an SQLite file
            data[place] ^= 1 << case.chance.randrange(8)
            (server.data / "log.db").write_bytes(data)
            for rest in ("log.db-wal", "log.db-shm"):
                (server.data / rest).unlink(missing_ok=True)
            if not await server.start():
                assert await server.ended() == 73, f"bit of byte {place}, round {nth}"
                continue
            for id, final in whole.items():
                check_served(await served(server, id), final, f"bit of byte {place}, round {nth}")
            await server.stop()


def check_served(events: list[dict[str, Any]] | None, final: Final, where: str) -> None:
    """What is served is what was written, up to where it was cut."""
    texts = [entry.body for entry in final.events]
    for event, body in zip(events or [], texts, strict=False):
        if event["type"] == "log_recovered":
            return
        assert event == msgspec.json.decode(body), where
    if events is not None:
        assert len(events) >= len(texts) or any(event["type"] == "log_recovered" for event in events), where


async def everything_is_read(server: Server, id: str) -> int:
    """A fresh subscriber gets all there is; returns how many events."""
    async with Subscriber("reader", server, id, History()) as reader:
        return await settled(reader)
