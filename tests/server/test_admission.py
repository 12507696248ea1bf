"""What the server refuses when it has enough to do, and what goes on all the same."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import psutil
import pytest

from agent_sdk.ids import new_id
from tests.server.test_serve import started
from tests.server.wire import Wire, request, upgrade

WAITING = {"command": "until [ -e go ]; do sleep 0.05; done"}


async def configure(wire: Wire, *steps: dict) -> None:
    agent = {
        "llm": {"kind": "scripted", "steps": [*steps, {"step": "say", "text": "done"}]},
        "tools": ["terminal"],
    }
    assert "result" in await wire.call("conversation.configure", "conf", op_id=new_id(), agent=agent)


async def until_event(wire: Wire, kind: str) -> None:
    while True:
        for event in (await wire.message()).get("params", {}).get("events", []):
            if event["type"] == kind:
                return


async def test_a_message_beyond_the_turns_that_may_run_is_refused_before_it_is_written(start):
    async with (
        start(max_turns=1) as server,
        server.session(resume={"after_seq": 0}) as busy,
        server.session() as other,
    ):
        await configure(busy, {"step": "call", "tool": "terminal", "arguments": WAITING})
        await configure(other)
        assert "result" in await busy.call("send_message", 1, op_id=new_id(), text="work")
        before = (await other.call("conversation.state", 1))["result"]["head_seq"]
        op_id = new_id()
        error = (await other.call("send_message", 2, op_id=op_id, text="me too"))["error"]
        assert (error["code"], error["data"]["reason"], error["data"]["limit"]) == (-32001, "turns run", 1)
        assert error["data"]["retry_after_ms"] > 0
        assert (await other.call("conversation.state", 3))["result"]["head_seq"] == before
        # The turn that runs takes messages, and when it is over there is room for another.
        assert "result" in await busy.call("send_message", 4, op_id=new_id(), text="more")
        root = (await busy.call("workspace.describe", 5))["result"]["root"]
        Path(root, "go").touch()
        await until_event(busy, "turn_ended")
        assert "result" in await other.call("send_message", 6, op_id=op_id, text="me too")


async def test_a_message_that_starts_no_turn_takes_no_place(start):
    async with start(max_turns=1) as server, server.session() as one, server.session() as two:
        await configure(two)
        error = (await one.call("send_message", 1, op_id=new_id(), text="nobody answers"))["error"]
        assert error["data"]["kind"] == "state_conflict"
        assert "result" in await two.call("send_message", 1, op_id=new_id(), text="hi")


async def test_a_full_disk_stops_writes_not_reads_and_health_tells(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    async with started(tmp_path / "data") as server, server.session() as wire:
        limits = psutil.Process(server.pid).rlimit(psutil.RLIMIT_FSIZE)
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_FSIZE, (1, limits[1]))
        error = (await wire.call("set_title", 1, op_id=new_id(), title="x" * 1000))["error"]
        assert error["data"]["kind"] == "storage_full"
        assert await health(server) == {"status": "degraded", "degraded": ["disk"]}
        assert (await wire.call("conversation.events", 2))["result"]["head_seq"] == 1
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_FSIZE, limits)
        assert "result" in await wire.call("set_title", 3, op_id=new_id(), title="y")
        assert await health(server) == {"status": "ok"}


async def health(server) -> dict:
    async with await Wire.open(server.port) as wire:
        return (await wire.ask(request("GET", "/health", [("Host", "localhost")]))).json


async def test_more_clients_than_descriptors_are_refused_and_the_others_are_served(tmp_path):
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            started(tmp_path / "data", through=["prlimit", "--nofile=128"])
        )
        healthy = await stack.enter_async_context(server.session())
        statuses = []
        for _ in range(150):
            wire = await stack.enter_async_context(await Wire.open(server.port))
            await wire.send(upgrade(server.key))
            statuses.append((await wire.answer()).status)
        assert set(statuses) == {101, 429}
        assert statuses[-1] == 429
        assert (await healthy.call("execute", op_id=new_id(), shell="echo here"))["result"][
            "stdout_text"
        ] == "here\n"


async def test_connections_that_come_all_at_once_are_answered_or_refused_and_leave_nothing(tmp_path):
    async with started(tmp_path / "data", through=["prlimit", "--nofile=128"]) as server:

        async def knock() -> int:
            async with await Wire.open(server.port) as wire:
                return (await wire.ask(request("GET", "/health", [("Host", "localhost")]))).status

        for _ in range(4):  # what is left behind would be missing in the end
            statuses = await asyncio.gather(*(knock() for _ in range(250)))
            assert set(statuses) <= {200, 429}
            assert statuses.count(200) > 0


async def test_a_box_beyond_those_that_may_run_is_refused_until_another_has_ended(start):
    async with start(max_boxes=1, idle_seconds=0.0) as server, server.session() as other:
        async with server.session() as first:
            assert "result" in await first.call("execute", 1, op_id=new_id(), shell="true")
            assert "result" in await first.call("execute", 2, op_id=new_id(), shell="true")
            error = (await other.call("execute", 1, op_id=new_id(), shell="true"))["error"]
            assert (error["code"], error["data"]["reason"], error["data"]["limit"]) == (
                -32001,
                "boxes run",
                1,
            )
        await server.log.until("box_ended")
        assert "result" in await other.call("execute", 2, op_id=new_id(), shell="true")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace makes the disk fail")
async def test_a_disk_that_fails_ends_the_server_with_74_at_once(tmp_path):
    """It does not even drain: nothing more may be acknowledged."""
    inject = "inject=fdatasync,fsync:error=EIO:when=60+"
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync", "-e", inject]
    async with started(tmp_path / "data", through=strace) as server, server.session() as wire:
        acknowledged = 0
        with suppress(AssertionError, asyncio.IncompleteReadError, ConnectionError):
            for number in range(1000):
                answer = await wire.call("set_title", number, op_id=new_id(), title=str(number))
                if "error" in answer:
                    assert answer["error"]["data"]["kind"] == "workspace_unavailable"
                    break
                acknowledged += 1
        assert 0 < acknowledged < 1000
        assert await server.ended() == 74
