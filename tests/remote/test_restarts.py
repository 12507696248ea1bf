"""The server ends under its clients, by request or without a word, and they do not notice more than a delay."""

from __future__ import annotations

import asyncio
import os

import pytest

from agent_sdk import Agent, ConfirmationPolicy, Conversation, RemoteWorkspace, tool
from agent_sdk.protocol.events import RequestOpened, ToolCalled, ToolReturned
from agent_sdk.testing import ScriptedLLM, call, say
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
