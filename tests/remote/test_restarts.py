"""The server ends under its clients, by request or without a word, and they do not notice more than a delay."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from agent_sdk import Agent, AgentServer, ConfirmationPolicy, Conversation, RemoteWorkspace, tool
from agent_sdk.protocol.errors import TurnWaits
from agent_sdk.protocol.events import RequestOpened, ToolCalled, ToolReturned, Waiting
from agent_sdk.testing import ScriptedLLM, call, hang, say
from tests.chaos.server import KEY, Server


@pytest.fixture
async def server(tmp_path):
    """A server that its boxes outlive."""
    async with Server(tmp_path, boxes_on_stop="keep") as server:
        await server.start()
        yield server


@pytest.fixture
async def workspace(server):
    async with RemoteWorkspace(f"http://127.0.0.1:{server.port}", KEY) as workspace:
        yield workspace


async def again(server: Server, end: str) -> None:
    """End the server so, and start the next one."""
    await (server.stop() if end == "SIGTERM" else server.kill())
    assert await server.start()


ENDS = pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])


@ENDS
async def test_run_waits_for_a_turn_that_the_next_server_ends(server, workspace, tmp_path, end):
    seen: list[int] = []
    called = asyncio.Event()
    os.mkfifo(tmp_path / "go")

    def see(event) -> None:
        seen.append(event.seq)
        if isinstance(event, ToolCalled):
            called.set()

    command = f"echo once >> runs; cat {tmp_path / 'go'}"
    agent = Agent(llm=ScriptedLLM([call("terminal", command=command), say("done")]))
    conversation = Conversation(agent, workspace, callbacks=[see])
    await conversation.send_message("go")
    running = asyncio.create_task(conversation.run())
    await called.wait()
    go = await asyncio.to_thread(open, tmp_path / "go", "wb")  # returns when the command reads
    await again(server, end)
    go.write(b"went on\n")
    go.close()
    outcome = await running
    assert (outcome.status, outcome.final_text) == ("finished", "done")
    returned = [event async for event in conversation.events() if isinstance(event, ToolReturned)]
    assert [("went on" in event.text, event.is_error) for event in returned] == [(True, False)]
    assert await workspace.files.read("runs") == b"once\n"
    assert seen == list(range(1, len(seen) + 1))


@ENDS
async def test_a_command_and_its_output_go_on_while_there_is_no_server(server, workspace, end):
    heard: list[bytes] = []
    begun = asyncio.Event()

    def hear(_: str, data: bytes) -> None:
        heard.append(data)
        begun.set()

    script = "echo once >> runs; for i in $(seq 20); do echo $i; sleep 0.1; done; exit 7"
    running = asyncio.create_task(workspace.execute(script, on_output=hear))
    await begun.wait()
    await again(server, end)
    result = await running
    assert (result.status, result.exit_code) == ("exited", 7)
    expected = "".join(f"{number}\n" for number in range(1, 21))
    assert (result.stdout, b"".join(heard).decode()) == (expected, expected)
    assert await workspace.files.read("runs") == b"once\n"


@ENDS
async def test_a_process_is_fed_and_heard_by_the_next_server(server, workspace, end):
    process = await workspace.start(["cat"])
    output = process.output()
    await process.write(b"before\n")
    said = await anext(output)
    await again(server, end)
    await process.write(b"after\n")
    await process.close_stdin()
    async for data in output:
        said += data
    assert (said, (await process.wait()).exit_code) == (b"before\nafter\n", 0)


@ENDS
async def test_what_waits_for_the_client_waits_on_and_is_asked_once(server, workspace, end):
    asked: list[str] = []

    @tool
    async def ask_me(question: str) -> str:
        """Ask the user."""
        asked.append(question)
        await again(server, end)
        return "forty-two"

    async def see(event) -> None:
        if isinstance(event, RequestOpened) and event.request == "approval":
            await again(server, end)
            await conversation.respond(event.request_id, "approve")

    agent = Agent(llm=ScriptedLLM([call("ask_me", question="what?"), say("done")]), tools=[ask_me])
    policy = ConfirmationPolicy(mode="always")
    conversation = Conversation(agent, workspace, callbacks=[see], confirmation=policy)
    await conversation.send_message("go")
    assert (await conversation.run()).final_text == "done"
    returned = [event.text async for event in conversation.events() if isinstance(event, ToolReturned)]
    assert (asked, returned) == (["what?"], ["forty-two"])


# --- calls that come while a server drains ---


async def test_calls_that_come_during_a_drain_take_effect_on_the_next_server(tmp_path):
    """The model of one agent does not answer, which holds the drain up; another waits for an approval."""
    async with Server(tmp_path, boxes_on_stop="keep", drain_seconds=3) as server:
        await server.start()
        async with RemoteWorkspace(f"http://127.0.0.1:{server.port}", KEY) as workspace:
            asked, opened = asyncio.Event(), asyncio.Event()
            requests: list[str] = []

            def see(event) -> None:
                if isinstance(event, RequestOpened):
                    requests.append(event.request_id)
                    opened.set()

            steps = [say("a word"), hang()]
            silent = Conversation(
                Agent(llm=ScriptedLLM(steps), tools=[]), workspace, on_delta=lambda _: asked.set()
            )
            careful = Conversation(
                Agent(llm=ScriptedLLM([call("terminal", command="echo yes"), say("done")])),
                workspace,
                callbacks=[see],
                confirmation=ConfirmationPolicy(mode="always"),
            )
            await silent.send_message("go")
            await silent.run()
            await silent.send_message("on")
            await careful.send_message("go")
            await opened.wait()
            server.signal(signal.SIGTERM)
            await server.said("server_draining")
            calls = [
                silent.pause(),
                silent.interrupt("enough"),
                silent.set_title("stopped"),
                careful.respond(requests[0], "approve"),
                careful.send_message("and then?"),
            ]
            tasks = [asyncio.create_task(call) for call in calls]
            assert await server.ended() == 0
            assert not any(task.done() for task in tasks)
            await server.start()
            await asyncio.gather(*tasks)
            outcome = await silent.run()
            assert (outcome.status, outcome.reason) == ("interrupted", "enough")
            assert (await silent.state()).title == "stopped"
            assert (await careful.run()).final_text == "done"


async def last_words(server: Server, when: str) -> None:
    """Begin to stop the server; returns while it drains, or when there is none."""
    server.signal(signal.SIGTERM)
    await (server.said("server_draining") if when == "draining" else server.ended())


@pytest.mark.parametrize(
    ("verb", "when"),
    [("pause", "draining"), ("interrupt", "draining"), ("pause", "away"), ("message", "away")],
)
async def test_what_stops_a_turn_while_there_is_no_server_comes_before_anything_new(tmp_path, verb, when):
    """The command that runs ends meanwhile: only the client's word keeps the next one from running."""
    os.mkfifo(tmp_path / "go")
    async with Server(tmp_path, boxes_on_stop="keep", drain_seconds=1) as server:
        await server.start()
        async with RemoteWorkspace(f"http://127.0.0.1:{server.port}", KEY) as workspace:
            called, asked = asyncio.Event(), asyncio.Event()

            def see(event) -> None:
                if isinstance(event, ToolCalled):
                    called.set()

            steps = [
                call("terminal", command=f"cat {tmp_path / 'go'}"),
                call("terminal", command="echo next >> ran"),
                say("done"),
            ]
            conversation = Conversation(Agent(llm=ScriptedLLM(steps)), workspace, callbacks=[see])
            silent = Conversation(
                Agent(llm=ScriptedLLM([hang(saying="a word")]), tools=[]),
                workspace,
                on_delta=lambda _: asked.set(),
            )
            await silent.send_message("hold the drain up")
            await conversation.send_message("go")
            running = asyncio.create_task(conversation.run())
            await called.wait()
            await asked.wait()
            go = await asyncio.to_thread(open, tmp_path / "go", "wb")  # returns when the command reads
            await last_words(server, when)
            stops = {
                "pause": conversation.pause,
                "interrupt": conversation.interrupt,
                "message": lambda: conversation.send_message("stop", mode="interrupt"),
            }
            stopping = asyncio.create_task(stops[verb]())
            if when == "draining":
                await server.ended()
            go.write(b"went on\n")
            go.close()
            await server.start()
            await stopping
            outcome = await running
            assert outcome.status == {"pause": "paused"}.get(verb, "interrupted")
            turn = [event async for event in conversation.events() if isinstance(event, ToolCalled)]
            before = [event for event in turn if event.run_id == outcome.run_id]
            assert len(before) == 1


# --- a server that keeps no keys: what an agent had of secrets is gone with it ---


def secretive(*steps) -> Agent:
    """An agent whose command shows how long its secret is."""
    return Agent(llm=ScriptedLLM([call("terminal", command="echo ${#TOKEN}"), *steps] * 3))


async def said(conversation) -> list[str]:
    events = [event async for event in conversation.events()]
    return [event.text.splitlines()[0] for event in events if isinstance(event, ToolReturned)]


@ENDS
async def test_an_agent_that_was_idle_goes_on_with_its_key_after_a_restart(server, workspace, end):
    conversation = Conversation(secretive(say("done")), workspace, secrets={"TOKEN": "12345678"})
    for turn in range(3):
        await conversation.send_message("go")
        assert (await conversation.run()).final_text == "done"
        if turn < 2:
            await again(server, end)
    assert await said(conversation) == ["8", "8", "8"]
    assert (await conversation.state()).waits == ()


async def test_an_agent_goes_on_after_a_restart_as_it_was_changed_meanwhile(server, workspace):
    conversation = Conversation(
        Agent(llm=ScriptedLLM([say("never said")])), workspace, secrets={"TOKEN": "1234"}, title="first"
    )
    await conversation.switch_llm(secretive(say("done")).llm)
    await conversation.update_secrets({"TOKEN": "12345678"})
    await conversation.set_title("second")
    async with RemoteWorkspace(
        f"http://127.0.0.1:{server.port}", KEY, conversation=conversation.id
    ) as elsewhere:
        await Conversation(None, elsewhere, id=conversation.id).set_confirmation_policy(
            ConfirmationPolicy(mode="always")
        )
    await again(server, "SIGKILL")
    await conversation.send_message("go")

    async def approve(wait) -> None:
        if wait.what == "approval":
            await conversation.respond(wait.request_id, "approve")

    assert (await conversation.run(on_waiting=approve)).final_text == "done"
    assert await said(conversation) == ["8"]
    assert (await conversation.state()).title == "second"


async def test_who_does_not_hold_the_agent_is_told_that_its_key_is_missing(server, workspace):
    conversation = Conversation(secretive(say("done")), workspace, secrets={"TOKEN": "12345678"})
    await conversation.send_message("go")
    await conversation.run()
    await conversation.close()
    await again(server, "SIGKILL")
    listed = await AgentServer(f"http://127.0.0.1:{server.port}", KEY).conversations()
    [seen] = [each for each in listed if each.id == conversation.id]
    assert (seen.state, [wait.what for wait in seen.waits], seen.stats.model_calls) == ("idle", ["key"], 0)
    watcher = Conversation(None, workspace, id=conversation.id)
    state = await watcher.state()
    assert state.waiting_for == seen.waiting_for
    assert (state.state, [wait.what for wait in state.waits]) == ("idle", ["key"])
    assert "configure the conversation again" in state.waiting_for
    await watcher.send_message("more")
    with pytest.raises(TurnWaits, match="TOKEN"):
        await watcher.run()
    [waits] = [event async for event in watcher.events() if isinstance(event, Waiting)]
    assert (waits.what, "TOKEN" in waits.reason) == ("key", True)
    told = []
    running = asyncio.create_task(watcher.run(on_waiting=told.append))
    async with RemoteWorkspace(
        f"http://127.0.0.1:{server.port}", KEY, conversation=conversation.id
    ) as elsewhere:
        owner = Conversation(
            secretive(say("done")), elsewhere, id=conversation.id, secrets={"TOKEN": "12345678"}
        )
        async with owner:
            assert (await running).status == "finished"
    assert [wait.what for wait in told] == ["key"]
    assert (await watcher.state()).waits == ()


async def test_run_tells_that_the_server_is_away(server, workspace):
    away = asyncio.Event()
    agent = Agent(llm=ScriptedLLM([call("terminal", command="sleep 1"), say("done")]))
    conversation = Conversation(
        agent, workspace, on_waiting=lambda wait: wait.what == "server" and away.set()
    )
    await conversation.send_message("go")
    running = asyncio.create_task(conversation.run())
    await server.kill()
    await away.wait()
    assert await server.start()
    assert (await running).final_text == "done"
