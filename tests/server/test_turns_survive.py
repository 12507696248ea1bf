"""Turns whose server is killed: the next one goes on with them by itself, and nothing is done twice."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
from aiohttp import web

from agent_sdk.conversation.log import operation, with_acceptance
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.events import TurnEnded, TurnStarted, UserMessage
from agent_sdk.protocol.methods.conversation import SendMessage
from tests.agent.llm.provider import events as spoken
from tests.conftest import SHORT_LIVED
from tests.server.wire import GUARD
from workspaces.box.process import BoxProcess

MODEL_KEY = "sk-a-key-that-nobody-may-find-0123456789"
SECRETS_KEY = "sealing-key-0123456789abcdef"
SECRET = "hunter2-but-much-longer"


class Server:
    """A server in a process of its own, and one client of its plain HTTP."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, key: str) -> None:
        self.process = process
        self.http = aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"})

    @classmethod
    async def start(cls, data: Path, **environment: str) -> Self:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent_server", "serve", "--json", "--port", "0", "--data", str(data)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **SHORT_LIVED, **environment},
        )
        async with asyncio.timeout(GUARD):
            ready = json.loads(await process.stdout.readline())
        return cls(process, ready["url"], Path(ready["api_key_file"]).read_text().strip())

    async def kill(self) -> None:
        self.process.kill()
        await self.ended()

    async def terminate(self) -> None:
        self.process.terminate()
        await self.ended()

    async def ended(self) -> None:
        async with asyncio.timeout(GUARD):
            await self.process.wait()
        await self.http.close()

    async def answer(self, method: str, conversation: str | None = None, **params: Any) -> dict:
        """The whole answer to a call."""
        query = {} if conversation is None else {"conversation": conversation}
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        async with asyncio.timeout(GUARD), self.http.post("/v1/rpc", params=query, json=body) as answer:
            return await answer.json()

    async def call(self, method: str, conversation: str | None = None, **params: Any) -> Any:
        answer = await self.answer(method, conversation, **params)
        assert "result" in answer, answer
        return answer["result"]

    async def conversation(self, *steps: dict, **options: Any) -> str:
        """A new conversation whose model says this."""
        hello = await self.call("initialize", protocol_version=1, client={"name": "test", "version": "0"})
        agent = options.pop("agent", scripted(*steps))
        await self.call(
            "conversation.configure", hello["conversation"], op_id=new_id(), agent=agent, **options
        )
        return hello["conversation"]

    async def say(self, conversation: str, text: str = "go") -> dict:
        return await self.call("send_message", conversation, op_id=new_id(), text=text)

    async def until(self, conversation: str, wanted: Callable[[dict], bool], after: int = 0) -> list[dict]:
        """The events up to one that is wanted, as they come."""
        found: list[dict] = []
        path, headers = f"/v1/conversations/{conversation}/events", {"Accept": "text/event-stream"}
        async with (
            asyncio.timeout(GUARD),
            self.http.get(path, params={"after": after}, headers=headers) as stream,
        ):
            async for line in stream.content:
                if line.startswith(b"data: ") and "seq" in (event := json.loads(line[6:])):
                    found.append(event)
                    if wanted(event):
                        return found
        raise AssertionError(f"the stream ended after {found}")


def scripted(*steps: dict, tools: tuple[str, ...] = ("terminal", "file_editor")) -> dict:
    return {"llm": {"kind": "scripted", "steps": list(steps)}, "tools": list(tools)}


def call(tool: str, **arguments: Any) -> dict:
    return {"step": "call", "tool": tool, "arguments": arguments}


def say(text: str) -> dict:
    return {"step": "say", "text": text}


def is_a(kind: str) -> Callable[[dict], bool]:
    return lambda event: event["type"] == kind


def these(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["type"] == kind]


class Pipe:
    """A named pipe that a command and the test speak through; opening it never blocks."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def __str__(self) -> str:
        return str(self.path)

    async def line(self) -> str:
        """What a command has written."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._fd, ready.set)
        try:
            async with asyncio.timeout(GUARD):
                await ready.wait()
        finally:
            loop.remove_reader(self._fd)
        return os.read(self._fd, 1000).decode()

    def write(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def pipe(tmp_path) -> Iterator[Callable[[str], Pipe]]:
    """Make named pipes."""
    made: list[Pipe] = []

    def make(name: str) -> Pipe:
        made.append(Pipe(tmp_path / name))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[Callable[..., Any]]:
    """Start servers on one data folder, one after the other; the last is ended with its boxes."""
    started: list[Server] = []

    async def start(**environment: str) -> Server:
        started.append(await Server.start(tmp_path / "data", **environment))
        return started[-1]

    yield start
    for each in started:
        if each.process.returncode is None:
            await each.terminate()
        await each.http.close()


# --- a message is in the log when the server dies, and its turn has not begun ---


ENDING = {
    "none": ([], []),
    "one ended": ([TurnStarted(run_id="before")], [TurnEnded(run_id="before", status="interrupted")]),
}


@pytest.mark.parametrize("turn", ENDING)
async def test_a_message_whose_turn_had_not_begun_is_answered_by_the_next_server(
    server, pipe, tmp_path, turn
):
    begun = pipe("begun")
    first = await server()
    id = await first.conversation(call("terminal", command=f"echo > {begun}"), say("heard"))
    await first.kill()
    op_id = new_id()
    async with EventLog.open(tmp_path / "data" / "log.db") as log:
        row = with_acceptance(operation(SendMessage(op_id=op_id, text="hello?")), "promised")
        before, after = ENDING[turn]
        await log.append(id, before)
        await log.append(id, [UserMessage(text="hello?", op_id=op_id)], op=row)
        await log.append(id, after)
    second = await server()
    await begun.line()  # nobody has asked this server for the conversation yet
    events = await second.until(
        id, lambda event: event["type"] == "turn_ended" and event["run_id"] != "before"
    )
    assert (events[-1]["run_id"], events[-1]["final_text"]) == ("promised", "heard")


# --- a command of the agent runs when the server dies ---


async def test_a_command_goes_on_and_the_next_server_has_its_result(server, pipe, tmp_path):
    begun, ran, go = pipe("begun"), tmp_path / "ran", pipe("go")
    command = f"echo once >> {ran}; echo > {begun}; read line < {go}; echo $line; echo done"
    first = await server()
    id = await first.conversation(call("terminal", command=command), say("all done"))
    accepted = await first.say(id)
    await begun.line()
    await first.kill()
    second = await server()
    await second.until(id, is_a("turn_resumed"))
    go.write("the rest")
    events = await second.until(id, is_a("turn_ended"))
    assert ran.read_text() == "once\n"
    [returned] = these(events, "tool_returned")
    assert returned["data"]["exit_code"] == 0
    assert "the rest\ndone" in returned["text"]
    assert [event["generation"] for event in these(events, "turn_resumed")] == [2]
    assert len(these(events, "turn_started")) == 1
    assert events[-1]["run_id"] == accepted["run_id"]
    assert (events[-1]["status"], events[-1]["final_text"]) == ("finished", "all done")


async def test_a_command_that_ended_meanwhile_has_its_result_too(server, pipe):
    begun, go, over = pipe("begun"), pipe("go"), pipe("over")
    command = f"echo > {begun}; read line < {go}; echo $line; (echo > {over} &); exit_code() {{ return 3; }}; exit_code"
    first = await server()
    id = await first.conversation(call("terminal", command=command), say("all done"))
    await first.say(id)
    await begun.line()
    await first.kill()
    go.write("said meanwhile")
    await over.line()
    second = await server()
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert returned["data"]["exit_code"] == 3
    assert "said meanwhile" in returned["text"]


async def test_a_command_whose_box_died_too_is_unknown_and_does_not_run_again(server, pipe, tmp_path):
    begun, ran = pipe("begun"), tmp_path / "ran"
    command = f"echo once >> {ran}; cut -d' ' -f4 /proc/$PPID/stat > {begun}; sleep 600"
    first = await server()
    id = await first.conversation(call("terminal", command=command), say("sorry"))
    await first.say(id)
    box = int(await begun.line())
    await first.kill()
    os.kill(box, 9)
    second = await server()
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert (returned["is_error"], returned["data"]) == (True, {"outcome": "unknown"})
    assert ran.read_text() == "once\n"
    assert events[-1]["final_text"] == "sorry"


async def test_a_command_is_not_begun_again_in_a_box_that_took_the_place_of_its_own(server, pipe, tmp_path):
    begun, ran = pipe("begun"), tmp_path / "ran"
    first = await server()
    command = f"echo once >> {ran}; cut -d' ' -f4 /proc/$PPID/stat > {begun}; sleep 600"
    id = await first.conversation(call("terminal", command=command), say("sorry"))
    await first.say(id)
    box = int(await begun.line())
    await first.kill()
    os.kill(box, 9)
    # As a server leaves it that is killed when the next box has begun, and the loss of this one is not told.
    data = tmp_path / "data"
    if (dying := await BoxProcess.find(data / "boxes" / id, data / "output" / id)) is not None:
        await dying.end()
    root, folder, spool = data / "workspaces" / id, data / "boxes" / id, data / "output" / id
    next_one = BoxProcess(root, folder, spool=spool)
    await next_one.start()
    next_one.let_go()
    second = await server()
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert (returned["is_error"], returned["data"]) == (True, {"outcome": "unknown"})
    assert ran.read_text() == "once\n"


async def test_a_command_survives_two_servers(server, pipe):
    begun, go = pipe("begun"), pipe("go")
    first = await server()
    id = await first.conversation(
        call("terminal", command=f"echo > {begun}; read line < {go}; echo $line"), say("ok")
    )
    await first.say(id)
    await begun.line()
    await first.kill()
    second = await server()
    await second.until(id, is_a("turn_resumed"))
    await second.kill()
    third = await server()
    await third.until(id, lambda event: event["type"] == "turn_resumed" and event["generation"] == 3)
    go.write("patience")
    events = await third.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert "patience" in returned["text"]


async def test_a_box_that_dies_is_said_once_and_its_command_is_unknown(server, pipe):
    begun = pipe("begun")
    running = await server()
    id = await running.conversation(
        call("terminal", command=f"cut -d' ' -f4 /proc/$PPID/stat > {begun}; sleep 600"), say("sorry")
    )
    await running.say(id)
    os.kill(int(await begun.line()), 9)
    events = await running.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert (returned["is_error"], returned["data"]) == (True, {"outcome": "unknown"})
    assert [event["state"] for event in these(events, "workspace_changed")] == ["lost"]
    assert events[-1]["final_text"] == "sorry"


# --- somebody has to answer ---


async def test_an_approval_that_was_asked_for_is_answered_after_the_restart(server, tmp_path):
    ran = tmp_path / "ran"
    first = await server()
    id = await first.conversation(
        call("terminal", command=f"echo once >> {ran}"), say("ok"), confirmation={"tools": ["terminal"]}
    )
    await first.say(id)
    [*_, asked] = await first.until(id, is_a("request_opened"))
    await first.kill()
    second = await server()
    await second.until(id, is_a("turn_resumed"))
    state = await second.call("conversation.state", id)
    assert (state["state"], [each["request_id"] for each in state["pending"]]) == (
        "awaiting",
        [asked["request_id"]],
    )
    op = new_id()
    answer = {"op_id": op, "request_id": asked["request_id"], "answer": "approve"}
    await second.call("respond", id, **answer)
    events = await second.until(id, is_a("turn_ended"))
    assert len(these(events, "request_opened")) == 1
    assert len(these(events, "tool_returned")) == 1
    assert ran.read_text() == "once\n"
    await second.kill()
    third = await server()
    assert await third.call("respond", id, **answer) == {}
    refused = await third.answer("respond", id, **{**answer, "answer": "reject"})
    assert refused["error"]["data"]["kind"] == "op_mismatch"
    assert await third.call("respond", id, **{**answer, "op_id": new_id()}) == {}
    refused = await third.answer("respond", id, **{**answer, "op_id": new_id(), "answer": "reject"})
    assert "is approved already, and the first answer counts" in refused["error"]["message"]


async def test_a_call_that_was_rejected_before_the_kill_does_not_run_after_it(server, tmp_path):
    """Two calls wait; one is refused, then the server dies."""
    ran = tmp_path / "ran"
    both = {
        "step": "calls",
        "calls": [
            call("terminal", command=f"echo one >> {ran}"),
            call("terminal", command=f"echo two >> {ran}"),
        ],
    }
    first = await server()
    id = await first.conversation(both, say("ok"), confirmation={"mode": "always"})
    await first.say(id)
    events = await first.until(id, is_a("request_opened"))
    events += await first.until(id, is_a("request_opened"), after=events[-1]["seq"])
    one, two = (event["request_id"] for event in these(events, "request_opened"))
    await first.call("respond", id, op_id=new_id(), request_id=two, answer="reject", reason="not this one")
    await first.kill()
    second = await server()
    await second.until(id, is_a("turn_resumed"))
    await second.call("respond", id, op_id=new_id(), request_id=one, answer="approve")
    events = await second.until(id, is_a("turn_ended"))
    assert [event["is_error"] for event in these(events, "tool_returned")] == [False, True]
    assert "not this one" in these(events, "tool_returned")[1]["text"]
    assert ran.read_text() == "one\n"


# --- the model is asked when the server dies ---


class Provider:
    """An OpenAI-like service that keeps its first caller waiting."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.news = asyncio.Condition()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        async with self.news:
            self.asked.append(await request.json())
            self.keys.append(request.headers.get("Authorization"))
            self.news.notify_all()
        if len(self.asked) == 1:
            await asyncio.Event().wait()
        return web.Response(body=spoken("openai", "hello again"), content_type="text/event-stream")

    async def was_asked(self) -> None:
        async with asyncio.timeout(GUARD), self.news:
            await self.news.wait_for(lambda: self.asked)


@asynccontextmanager
async def providing() -> AsyncIterator[tuple[Provider, dict]]:
    provider, app = Provider(), web.Application()
    app.router.add_post("/v1/chat/completions", provider.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    llm = {"kind": "llm", "model": "openai/some", "base_url": f"http://127.0.0.1:{port}/v1"}
    try:
        yield provider, llm
    finally:
        await runner.cleanup()


async def test_a_model_that_was_being_asked_is_asked_again(server):
    async with providing() as (provider, llm):
        first = await server()
        id = await first.conversation(agent={"llm": llm, "tools": ["think"]})
        await first.say(id, "are you there?")
        await provider.was_asked()
        await first.kill()
        second = await server()
        events = await second.until(id, is_a("turn_ended"))
        assert events[-1]["final_text"] == "hello again"
        assert len(provider.asked) == 2
        assert provider.asked[0] == provider.asked[1]
        assert len(these(events, "agent_message")) == 1


async def test_with_a_secrets_key_the_model_has_its_key_after_the_restart_and_no_file_shows_it(
    server, tmp_path
):
    async with providing() as (provider, llm):
        environment = {"AGENT_SERVER_SECRETS_KEY": SECRETS_KEY}
        first = await server(**environment)
        agent = {"llm": {**llm, "api_key": MODEL_KEY}, "tools": ["think"]}
        id = await first.conversation(agent=agent, secrets={"PASSWORD": SECRET})
        await first.say(id)
        await provider.was_asked()
        await first.kill()
        assert found_in(tmp_path / "data", MODEL_KEY, SECRET, SECRETS_KEY) == []
        second = await server(**environment)
        await second.until(id, is_a("turn_ended"))
        assert provider.keys == [f"Bearer {MODEL_KEY}"] * 2


@pytest.mark.parametrize("environment", [{}, {"AGENT_SERVER_SECRETS_KEY": "another-key-0123456789"}])
async def test_without_the_key_the_conversation_waits_says_so_and_goes_on_when_it_is_configured(
    server, tmp_path, environment
):
    before = {"AGENT_SERVER_SECRETS_KEY": SECRETS_KEY} if environment else {}
    async with providing() as (provider, llm):
        first = await server(**before)
        agent = {"llm": {**llm, "api_key": MODEL_KEY}, "tools": ["think"]}
        id = await first.conversation(agent=agent)
        accepted = await first.say(id)
        await provider.was_asked()
        await first.kill()
        assert found_in(tmp_path / "data", MODEL_KEY) == []
        second = await server(**environment)
        state = await second.call("conversation.state", id)
        assert state["state"] == "awaiting"
        assert "the model's API key" in state["waiting_for"]
        assert "configure the conversation again" in state["waiting_for"]
        assert (await second.say(id, "still there?"))["run_id"] == accepted["run_id"]
        assert (await second.call("run", id, op_id=new_id())) == {
            "run_id": accepted["run_id"],
            "running": True,
            "ended_seq": 0,
        }
        assert len(provider.asked) == 1
        await second.call("conversation.configure", id, op_id=new_id(), agent=agent)
        events = await second.until(id, is_a("turn_ended"))
        assert (events[-1]["run_id"], events[-1]["status"]) == (accepted["run_id"], "finished")
        assert len(provider.asked) == 2
        assert (await second.call("conversation.state", id)).get("waiting_for", "") == ""


async def test_what_was_changed_after_the_agent_was_configured_is_kept_too(server, tmp_path):
    """The model, a secret and the policy."""
    environment = {"AGENT_SERVER_SECRETS_KEY": SECRETS_KEY}
    first = await server(**environment)
    id = await first.conversation(say("never said"))
    script = scripted(call("terminal", command="echo ${#PASSWORD}"), say("ok"))["llm"]
    await first.call("switch_llm", id, op_id=new_id(), llm={**script, "model": "another"})
    await first.call("update_secrets", id, op_id=new_id(), secrets={"PASSWORD": SECRET})
    await first.call("set_confirmation_policy", id, op_id=new_id(), policy={"tools": ["terminal"]})
    await first.kill()
    second = await server(**environment)
    await second.say(id)
    [*_, asked] = await second.until(id, is_a("request_opened"))
    await second.call("respond", id, op_id=new_id(), request_id=asked["request_id"], answer="approve")
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert returned["text"].startswith(f"{len(SECRET)}\n")
    assert {event["model"] for event in these(events, "model_used")} == {"another"}
    assert found_in(tmp_path / "data", SECRET) == []


def found_in(folder: Path, *secrets: str) -> list[Path]:
    """The files that hold one of these texts."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [file for file in files if any(secret.encode() in file.read_bytes() for secret in secrets)]


# --- what the log says afterwards ---


async def test_calls_are_answered_as_before_when_they_come_again_after_a_restart(server):
    first = await server()
    hello = await first.call("initialize", protocol_version=1, client={"name": "test", "version": "0"})
    id = hello["conversation"]
    configure = {"op_id": new_id(), "agent": scripted(say("hi")), "title": "mine"}
    await first.call("conversation.configure", id, **configure)
    message = {"op_id": new_id(), "text": "go"}
    accepted = await first.call("send_message", id, **message)
    run = {"op_id": new_id()}
    answer = await first.call("run", id, **run)
    before = await first.until(id, is_a("turn_ended"))
    await first.kill()
    second = await server()
    assert await second.call("conversation.configure", id, **configure) == {}
    assert await second.call("send_message", id, **message) == accepted
    assert await second.call("run", id, **run) == answer
    for op, method, other in (
        (configure, "conversation.configure", {"agent": scripted(say("ho"))}),
        (message, "send_message", {"text": "stop"}),
        (run, "pause", {}),
    ):
        refused = await second.answer(method, id, op_id=op["op_id"], **other)
        assert refused["error"]["data"]["kind"] == "op_mismatch"
    assert await second.until(id, is_a("turn_ended")) == before
    page = await second.call("conversation.events", id)
    assert page["head_seq"] == before[-1]["seq"]


async def test_a_drained_server_lets_go_of_a_waiting_turn_and_its_command_goes_on(server, pipe):
    begun, go = pipe("begun"), pipe("go")
    first = await server(AGENT_SERVER_BOXES_ON_STOP="keep")
    command = f"trap 'echo disturbed' INT; echo > {begun}; read line < {go}; echo $line"
    id = await first.conversation(call("terminal", command=command), say("ok"))
    await first.say(id)
    await begun.line()
    await first.terminate()
    assert first.process.returncode == 0
    second = await server()
    await second.until(id, is_a("turn_resumed"))
    go.write("undisturbed")
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert "undisturbed" in returned["text"]
    assert "disturbed\n" not in returned["text"].replace("undisturbed", "")
    assert [event["type"] for event in events if event["type"].startswith("turn")] == [
        "turn_started",
        "turn_resumed",
        "turn_ended",
    ]
