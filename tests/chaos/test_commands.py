"""Commands and turns go on while their server dies, and come to one end; when their box dies, that end is unknown."""

from __future__ import annotations

import asyncio
from typing import Any

import psutil
import pytest

from agent_sdk.ids import new_id
from tests.chaos import seed
from tests.chaos.checker import Violation, broken_rules
from tests.chaos.client import Caller, Output, Session, Subscriber
from tests.chaos.conftest import Case
from tests.chaos.server import Server
from tests.chaos.storm import settled

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

LINES = 20
COUNT = f"for i in $(seq {LINES}); do echo $i; sleep 0.1; done"
COUNTED = "".join(f"{nth}\n" for nth in range(1, LINES + 1)).encode()


async def conversation(server: Server, **configure: Any) -> str:
    """A new conversation, with an agent if one is described."""
    async with Session.open(server.port) as session:
        if configure:
            await session.call("conversation.configure", op_id=new_id(), **configure)
        return session.introduction["conversation"]


def agent(*steps: dict[str, Any]) -> dict[str, Any]:
    """An agent with a terminal that takes these steps."""
    return {"llm": {"kind": "scripted", "steps": list(steps)}, "tools": ["terminal"]}


def terminal(command: str) -> dict[str, Any]:
    return {"step": "call", "tool": "terminal", "arguments": {"command": command}}


SAY = {"step": "say", "text": "done"}


@pytest.mark.parametrize("lines", [0, 1, 3, 8, 13, 18, 20])
async def test_a_command_goes_on_while_the_server_is_dead(case, lines):
    async with case.server() as server:
        assert await server.start()
        id, op_id, output = await conversation(server), new_id(), Output()
        async with Caller("client", server, id, case.history) as client:
            shell = case.effect(op_id, COUNT)
            command = asyncio.create_task(client.effect("execute", op_id=op_id, output=output, shell=shell))
            await output.has(lines)
            await server.restart()
            result = await command
        assert (result["status"], result["exit_code"]) == ("exited", 0)
        assert (bytes(output.data), output.jumps) == (COUNTED, [])
        case.note_effects()
        await server.stop()
        await case.judge(server)


async def test_a_command_that_was_answered_is_answered_alike_after_a_kill(case):
    async with case.server() as server:
        assert await server.start()
        id, op_id = await conversation(server), new_id()
        async with Caller("client", server, id, case.history) as client:
            shell = case.effect(op_id, "echo out; exit 3")
            first = await client.effect("execute", op_id=op_id, shell=shell)
            await server.restart()
            assert await client.ask("execute", op_id=op_id, shell=shell) == first
        case.note_effects()
        await server.stop()
        await case.judge(server)


@pytest.mark.parametrize("lines", [1, 10, 19])
async def test_a_turn_whose_tool_call_was_running_comes_to_its_end_once(case, lines):
    async with case.server() as server:
        assert await server.start()
        marks = case.folder / "marks"
        command = f"for i in $(seq {LINES}); do echo $i; echo $i >> {marks}; sleep 0.1; done"
        id = await conversation(server, agent=agent(terminal(command), SAY))
        async with Subscriber("subscriber", server, id, case.history) as subscriber:
            async with Caller("client", server, id, case.history) as client:
                await client.effect("send_message", text="count")
            await has_lines(marks, lines)
            await server.restart()
            await settled(subscriber)
            events = (await subscriber.ask("conversation.events"))["events"]
        (returned,) = (event for event in events if event["type"] == "tool_returned")
        assert all(f"{nth}" in returned["text"] for nth in range(1, LINES + 1)), returned
        assert [event["status"] for event in events if event["type"] == "turn_ended"] == ["finished"]
        assert marks.read_bytes() == COUNTED
        await server.stop()
        await case.judge(server)


async def has_lines(file, lines: int) -> None:
    """Wait until a file has so many lines."""
    async with asyncio.timeout(30):
        while not file.exists() or file.read_bytes().count(b"\n") < lines:  # noqa: ASYNC110  a file tells nobody that it grew
            await asyncio.sleep(0.02)


async def test_an_approval_asked_for_before_a_kill_is_answered_after_it(case):
    async with case.server() as server:
        assert await server.start()
        asking = {"agent": agent(terminal("echo approved"), SAY), "confirmation": {"mode": "always"}}
        id = await conversation(server, **asking)
        async with Subscriber("subscriber", server, id, case.history) as subscriber:
            async with Caller("client", server, id, case.history) as client:
                await client.effect("send_message", text="go")
            (asked,) = await pending(subscriber)
            await server.restart()
            assert await pending(subscriber) == [asked]
            async with Caller("another", server, id, case.history) as another:
                await another.effect("respond", request_id=asked["request_id"], answer="approve")
            await settled(subscriber)
            events = (await subscriber.ask("conversation.events"))["events"]
        assert [event["status"] for event in events if event["type"] == "turn_ended"] == ["finished"]
        await server.stop()
        await case.judge(server)


async def pending(subscriber: Subscriber) -> list[dict[str, Any]]:
    """The requests that wait for an answer, once there is one."""
    while not (state := await subscriber.ask("conversation.state"))["pending"]:
        await subscriber.reach(state["head_seq"] + 1)
    return state["pending"]


async def kill_box(case: Case, mutant: str = "") -> tuple[dict[str, Any] | None, list[Violation]]:
    """Kill the box of a command that runs; what the client is told, and what the checker says."""
    async with case.server(mutant=mutant) as server:
        assert await server.start()
        id, op_id, output = await conversation(server), new_id(), Output()
        async with Caller("client", server, id, case.history) as client:
            shell = case.effect(op_id, "echo begun; sleep 600")
            command = asyncio.create_task(client.effect("execute", op_id=op_id, output=output, shell=shell))
            await output.has(1)
            (box,) = server.boxes()
            box.kill()
            result = await command
            assert await client.ask("execute", op_id=new_id(), shell="true"), "there is no new box"
            again = await client.ask("execute", op_id=op_id, shell=shell)
            assert result is None or again["status"] == result["status"]
        case.note_effects()
        await server.stop()
        return result, await case.violations(server)


async def test_a_command_whose_box_died_has_an_unknown_outcome_and_runs_once(case):
    result, violations = await kill_box(case)
    assert result["status"] == "unknown"
    assert not violations


async def test_a_dead_box_finds_a_build_that_keeps_its_children(case):
    _, violations = await kill_box(case, "children_kept")
    assert 8 in broken_rules(violations)


async def test_a_box_without_a_server_ends_itself_with_all_it_runs(case):
    async with case.server(box_linger_seconds=2) as server:
        assert await server.start()
        id = await conversation(server)
        async with Session.open(server.port, id) as session:
            await session.call("process.start", op_id=new_id(), shell="sleep 600")
        left = server.remains()
        assert len(left) >= 3
        await server.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, left, timeout=30)
        assert not alive
        assert not list((server.data / "output").glob("*/*"))
