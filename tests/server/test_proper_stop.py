"""A server that is stopped properly: it loses nothing that a kill would have left, and nothing holds it up."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from agent_sdk.idempotency import Asked, asked
from agent_sdk.ids import digest_of, new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import AgentMessage, ToolCalled, TurnStarted, UserMessage
from agent_sdk.protocol.methods.workspace import Execute
from agent_sdk.protocol.specs import Sandbox
from tests.docker.fake_engine import FakeEngine, never
from tests.server.test_boxes import ended
from tests.server.test_turns_survive import call, is_a, pipe, say, server, these
from tests.server.wire import GUARD
from workspaces.box.folder import BoxFolder, Record

HANG = {"step": "hang", "seconds": 0.3}


# --- what is written down and has not begun ---


@pytest.mark.parametrize("box", ["none", "fresh", "used"])
@pytest.mark.parametrize("stop", ["keep", "end"])
async def test_a_call_that_the_model_made_while_the_server_stopped_is_run_by_the_next_one(
    server,
    tmp_path,
    stop,
    box,
):
    ran = tmp_path / "ran"
    first = await server(AGENT_SERVER_BOXES_ON_STOP=stop)
    id = await first.conversation(HANG, call("terminal", command=f"echo once >> {ran}"), say("ok"))
    if box == "fresh":
        await first.call("files.list", id, path=".")
    if box == "used":
        await first.call("execute", id, op_id=new_id(), shell="true")
    await first.say(id)
    await first.until(id, is_a("turn_started"))
    await first.terminate()
    assert first.process.returncode == 0
    second = await server()
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert (returned["data"].get("exit_code"), ran.read_text()) == (0, "once\n")


async def test_a_call_of_the_model_that_no_box_had_begun_when_the_server_was_killed_is_run_by_the_next_one(
    server,
    tmp_path,
):
    ran = tmp_path / "ran"
    first = await server()
    id = await first.conversation(say("never asked for"))
    await first.kill()
    promise(tmp_path, id)
    async with EventLog.open(tmp_path / "data" / "log.db") as log:
        arguments = f'{{"command": "echo once >> {ran}"}}'
        await log.append(
            id,
            [
                UserMessage(text="go"),
                TurnStarted(run_id="r"),
                AgentMessage(run_id="r", text="", tool_calls=1),
                ToolCalled(run_id="r", call_id="c", tool="terminal", arguments=arguments, place="promised"),
            ],
        )
    second = await server()
    [returned] = these(await second.until(id, is_a("turn_ended")), "tool_returned")
    assert (returned["data"].get("exit_code"), ran.read_text()) == (0, "once\n")


async def test_a_call_of_a_client_that_no_box_had_begun_when_the_server_was_killed_is_run_when_it_is_repeated(
    server,
    tmp_path,
):
    first = await server()
    id = await first.conversation(say("hi"))
    await first.kill()
    promise(tmp_path, id)
    params = Execute(op_id=new_id(), shell="echo out")
    async with EventLog.open(tmp_path / "data" / "log.db") as log:
        digest = digest_of(params.method, asked(params))
        await log.operations(id).begin(Asked(params.op_id, digest, params.method, "promised"))
    second = await server()
    answer = await second.call("execute", id, op_id=params.op_id, shell=params.shell)
    assert (answer["status"], answer["stdout_text"]) == ("exited", "out\n")


def promise(tmp_path, id: str) -> None:
    """As a server leaves it that is killed before the box is there for which it has written a call down."""
    names = tmp_path / "data" / "names"
    names.mkdir()
    (names / id).write_text("promised")


# --- boxes ---


async def test_an_agent_that_only_talks_has_no_box_and_knows_where_it_is(server, tmp_path):
    running = await server()
    id = await running.conversation(say("hello"))
    await running.say(id)
    await running.until(id, is_a("turn_ended"))
    assert list((tmp_path / "data" / "boxes").iterdir()) == []


async def test_waiting_for_a_process_whose_box_died_says_that_nobody_knows(server):
    running = await server()
    id = await running.conversation(say("hi"))
    started = await running.call("process.start", id, op_id=new_id(), shell="echo $PPID; sleep 600")
    info = await running.call("workspace.describe", id)
    os.kill(info["pid"], signal.SIGKILL)
    assert (await running.call("process.wait", id, **process(started)))["status"] == "unknown"
    assert (await running.call("process.wait", id, **process(started)))["status"] == "unknown"
    refused = await running.answer("process.wait", id, process_id=new_id())
    assert refused["error"]["data"]["kind"] == "process_not_found"


def process(started: dict) -> dict:
    return {"process_id": started["process_id"]}


# --- turns that end their servers ---


async def test_a_turn_that_is_given_up_leaves_no_command(server, pipe):
    begun = pipe("begun")
    options = {"AGENT_SERVER_MAX_TURN_RESTARTS": "1"}
    running = await server(**options)
    id = await running.conversation(
        call("terminal", command=f"sleep 600 & echo $! > {begun}; wait"), say("never")
    )
    await running.say(id)
    command = int(await begun.line())
    await running.kill()
    running = await server(**options)
    await running.until(id, is_a("turn_resumed"))
    await running.kill()
    running = await server(**options)
    events = await running.until(id, is_a("turn_ended"))
    assert (events[-1]["status"], events[-1]["error"]) == ("failed", "limit_exceeded")
    await ended(command)


# --- starts that hang ---


async def pulling(engine: FakeEngine, server) -> tuple[str, asyncio.Task]:
    """A conversation whose sandbox waits for its image."""
    for path, answer in (("GET /containers/json", []), ("GET /volumes", {}), ("GET /networks", [])):
        engine.answer(path, answer)
    for path in ("GET /events", "POST /images/create"):
        engine.on(path, never)
    hello = await server.call(
        "initialize",
        protocol_version=1,
        client={"name": "test", "version": "0"},
        workspace={"sandbox": {"image": "some/image:1"}},
    )
    id = hello["conversation"]
    waiting = asyncio.create_task(server.answer("files.list", id, path="."))
    async with asyncio.timeout(GUARD):
        await engine.called("POST /images/create")
    return id, waiting


async def test_an_image_that_is_pulled_holds_up_neither_a_deletion_nor_the_end(server, tmp_path):
    async with FakeEngine(tmp_path).listening() as engine:
        running = await server(AGENT_SERVER_ENGINE=engine.url, AGENT_SERVER_DRAIN_SECONDS="1")
        id, waiting = await pulling(engine, running)
        assert await running.call("conversation.delete", id, op_id=new_id()) == {}
        await waiting
        engine.calls.clear()
        _, waiting = await pulling(engine, running)
        await running.terminate()
        assert running.process.returncode == 0
        await asyncio.gather(waiting, return_exceptions=True)
    assert list((tmp_path / "data" / "boxes").iterdir()) == []


async def test_a_second_signal_ends_a_server_that_waits_for_a_command(server, pipe):
    begun = pipe("begun")
    running = await server(AGENT_SERVER_DRAIN_SECONDS="600", AGENT_SERVER_BOXES_ON_STOP="keep")
    id = await running.conversation(say("hi"))
    command = asyncio.create_task(
        running.answer("execute", id, op_id=new_id(), shell=f"echo > {begun}; sleep 600")
    )
    await begun.line()
    running.process.terminate()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await asyncio.shield(command)
    await running.terminate()
    assert running.process.returncode == 0
    await asyncio.gather(command, return_exceptions=True)
    second = await server()
    [left] = (await second.call("conversation.state", id))["operations"]
    assert left["method"] == "execute"


async def test_a_server_that_waits_for_an_engine_at_its_start_ends_when_it_is_asked_to(tmp_path):
    record = Record(
        instance="i", container="c", spec=Sandbox(image="x"), image="sha256:1", runtime="runc", claimed=True
    )
    (tmp_path / "data").mkdir(mode=0o700)
    BoxFolder(tmp_path / "data" / "boxes" / "gone").make()
    BoxFolder(tmp_path / "data" / "boxes" / "gone").write(record)
    async with FakeEngine(tmp_path).listening() as engine:
        engine.on("GET /version", never)
        starting = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent_server", "serve", "--port", "0", "--data", str(tmp_path / "data")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "AGENT_SERVER_ENGINE": engine.url},
        )
        async with asyncio.timeout(GUARD):
            await engine.called("GET /version")
            starting.terminate()
            said, complaint = await starting.communicate()
    assert (starting.returncode, said) == (0, b"")
    assert b"Traceback" not in complaint
    assert BoxFolder(tmp_path / "data" / "boxes" / "gone").read() == record
