"""Conversations of this process: the contract, and what only a conversation here has to promise."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from agent_sdk.definition import Agent
from agent_sdk.local.conversation import FILE_NAME, LocalConversation
from agent_sdk.local.log import EventLog
from agent_sdk.local.workspace import LocalWorkspace
from agent_sdk.protocol.errors import InvalidParams, OpMismatch, StateConflict
from agent_sdk.protocol.events import (
    AgentConfigured,
    AgentMessage,
    Interrupted,
    RequestOpened,
    RequestResolved,
    ToolReturned,
    TurnEnded,
    TurnStarted,
    UserMessage,
    decode,
    kind_of,
)
from agent_sdk.protocol.specs import AgentSpec, ScriptedLLM, ToolSpec
from agent_sdk.testing import call, calls, hang, say
from agent_sdk.tools import ToolResult
from tests.contract.conversation import (
    PATIENCE,
    ConversationContract,
    Gate,
    acting,
    ended,
    last_result,
    past,
    these,
    until,
)

ROOT = Path(__file__).parents[2]
OP = "01890000-0000-7000-8000-000000000001"


@pytest.fixture
async def open(tmp_path):
    """Conversations in one folder that share an entered workspace."""
    folder = tmp_path / "work"
    folder.mkdir()
    async with AsyncExitStack() as stack:
        workspace = await stack.enter_async_context(LocalWorkspace(folder))

        async def opened(agent, **options):
            return await stack.enter_async_context(LocalConversation(agent, workspace, **options))

        yield opened


class TestLocal(ConversationContract):
    pass


# --- opening and closing ---


async def test_a_folder_is_workspace_enough(tmp_path):
    conversation = LocalConversation(
        acting(call("file_editor", command="view", path="."), say("done")), tmp_path
    )
    await conversation.send_message("look")
    assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    await conversation.close()


async def test_a_folder_that_does_not_exist_is_an_error_at_the_first_use(tmp_path):
    conversation = LocalConversation(acting(say("done")), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await conversation.send_message("look")
    (tmp_path / "nowhere").mkdir()
    await conversation.send_message("look")
    await conversation.close()


async def test_closing_leaves_no_thread_and_no_task(tmp_path):
    before = asyncio.all_tasks()
    conversation = LocalConversation(acting(hang(), say("done")), tmp_path, callbacks=[lambda event: None])
    await conversation.send_message("go")
    await conversation.close()
    assert asyncio.all_tasks() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("event-log")]


async def test_closing_twice_and_at_once_is_fine(open):
    conversation = await open(acting(say("done")))
    await asyncio.gather(conversation.close(), conversation.close())
    await conversation.close()
    assert (await conversation.state()).state == "closed"


async def test_a_closed_conversation_refuses_messages(open):
    conversation = await open(acting(say("done")))
    await conversation.close()
    with pytest.raises(StateConflict):
        await conversation.send_message("more")


async def test_a_callback_may_close_the_conversation(open):
    conversation = await open(acting(say("done"), say("unused")), callbacks=[lambda event: closing(event)])

    async def closing(event):
        if isinstance(event, TurnEnded):
            await conversation.close()

    await conversation.send_message("go")
    assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    await conversation.close()


async def test_who_follows_a_conversation_hears_of_its_end(open):
    conversation = await open(acting(hang()))
    following = asyncio.create_task(collected(conversation))
    await conversation.send_message("go")
    await until(conversation, TurnStarted)
    await conversation.close()
    events = await following
    assert isinstance(events[-1], TurnEnded)


async def collected(conversation):
    return [event async for event in conversation.events(follow=True)]


async def test_a_first_call_that_is_cancelled_does_not_break_the_opening(tmp_path):
    conversation = LocalConversation(acting(say("done")), tmp_path)
    first = asyncio.create_task(conversation.send_message("go"))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await conversation.send_message("go")
    assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    await conversation.close()


@pytest.mark.parametrize("id", ["", "a/b", "x" * 65, "ä"])
def test_an_id_that_cannot_be_a_name_is_refused(id):
    with pytest.raises(InvalidParams, match="id"):
        LocalConversation(acting(say("done")), ".", id=id)


@pytest.mark.parametrize(
    ("agent", "complaint"),
    [
        (Agent(llm=ScriptedLLM(steps=(say("x"),)), tools=["browser"]), "browser"),
        (AgentSpec(llm=ScriptedLLM(steps=(say("x"),)), tools=("think", "think")), "think"),
    ],
)
async def test_an_agent_that_cannot_be_is_refused_at_the_first_use(tmp_path, agent, complaint):
    conversation = LocalConversation(agent, tmp_path)
    with pytest.raises(InvalidParams, match=complaint):
        await conversation.send_message("go")
    await conversation.close()


# --- the log on disk ---


async def test_the_same_id_goes_on_where_it_was(tmp_path):
    agent = acting(call("think", thought="hm"), say("one"), say("two"))
    options = {"id": "mine", "persistence_dir": tmp_path / "log", "title": "T"}
    async with LocalConversation(agent, tmp_path, **options) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
        before, stats, epoch = await past(first), await first.stats(), first.epoch
    async with LocalConversation(agent, tmp_path, **options) as second:
        assert await past(second) == before
        assert (await second.stats(), second.epoch) == (stats, epoch)
        assert (await second.state()).title == "T"
        await second.send_message("2")
        assert (await second.run(timeout=PATIENCE)).final_text == "two"


async def test_callbacks_of_a_reopened_conversation_hear_what_is_new(tmp_path):
    options = {"id": "mine", "persistence_dir": tmp_path}
    async with LocalConversation(acting(say("one")), tmp_path, **options) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
        head = first.head_seq
    heard = []
    async with LocalConversation(acting(say("one")), tmp_path, callbacks=[heard.append], **options) as second:
        await second.set_title("new")
    assert [event.seq for event in heard] == [head + 1]


async def test_another_agent_is_written_down_when_the_conversation_is_opened_again(tmp_path):
    options = {"id": "mine", "persistence_dir": tmp_path}
    async with LocalConversation(acting(say("one")), tmp_path, **options):
        pass
    async with LocalConversation(acting(say("one"), tools=["think"]), tmp_path, **options) as second:
        assert [event.tools for event in await these(second, AgentConfigured)][1:] == [("think",)]


async def test_a_closed_turn_may_be_continued_when_the_log_is_opened_again(tmp_path):
    options = {"id": "mine", "persistence_dir": tmp_path}
    async with LocalConversation(acting(hang(), say("done")), tmp_path, **options) as first:
        await first.send_message("go")
    async with LocalConversation(acting(say("done")), tmp_path, **options) as second:
        assert (await ended(second)).status == "interrupted"
        assert await these(second, Interrupted) == []
        assert (await second.state()).state == "paused"
        assert (await second.run(timeout=PATIENCE)).final_text == "done"


async def test_the_list_of_tasks_survives(tmp_path):
    plan = call("task_tracker", command="plan", task_list=[{"title": "survive", "status": "done"}])
    view = call("task_tracker", command="view")
    options = {"id": "mine", "persistence_dir": tmp_path}
    async with LocalConversation(acting(plan, say("one"), view, say("two")), tmp_path, **options) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
    async with LocalConversation(acting(plan, say("one"), view, say("two")), tmp_path, **options) as second:
        await second.send_message("2")
        await second.run(timeout=PATIENCE)
        assert "[x] survive" in (await last_result(second)).text


CRASHES = """
import asyncio, sys
from agent_sdk.local.conversation import LocalConversation
from agent_sdk.definition import Agent
from agent_sdk.protocol.specs import ScriptedLLM, ConfirmationPolicy
from agent_sdk.protocol.events import RequestOpened
from agent_sdk.testing import call, calls, say

async def main():
    agent = Agent(llm=ScriptedLLM(steps=(calls(call("think", thought="a"), call("terminal", command="true")),)))
    policy = ConfirmationPolicy(tools=("terminal",))
    conversation = LocalConversation(
        agent, sys.argv[1], id="mine", persistence_dir=sys.argv[1], confirmation=policy
    )
    await conversation.send_message("go")
    async for event in conversation.events(follow=True):
        if event.__struct_config__.tag == "tool_returned":
            print("now", flush=True)
            sys.stdin.read()

asyncio.run(main())
"""


def crashed(folder: Path) -> None:
    """A process that dies while its agent waits for an approval, with one of two results written."""
    child = subprocess.Popen(
        [sys.executable, "-c", CRASHES, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},  # what a killed process leaves behind goes with the test
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"now\n"
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()


async def test_a_turn_whose_process_died_is_closed_once_and_may_be_continued(tmp_path):
    crashed(tmp_path)
    agent = acting(calls(call("think", thought="a"), call("terminal", command="true")), say("done"))
    options = {"id": "mine", "persistence_dir": tmp_path}
    async with LocalConversation(agent, tmp_path, **options) as conversation:
        results = await these(conversation, ToolReturned)
        assert [event.is_error for event in results] == [False, True]
        assert results[1].data == {"outcome": "unknown"}
        assert [event.answer for event in await these(conversation, RequestResolved)] == ["void"]
        end = await ended(conversation)
        assert (end.status, end.reason) == ("interrupted", "the process that ran it ended")
        assert end.run_id == (await these(conversation, TurnStarted))[0].run_id
        events = await past(conversation)
    async with LocalConversation(agent, tmp_path, **options) as conversation:
        assert [kind_of(event) for event in await past(conversation)] == [kind_of(event) for event in events]
        assert (await conversation.run(timeout=PATIENCE)).final_text == "done"


async def test_a_second_process_that_opens_the_conversation_takes_it(tmp_path):
    options = {"id": "mine", "persistence_dir": tmp_path}
    async with (
        LocalConversation(acting(say("one")), tmp_path, **options) as first,
        LocalConversation(acting(say("one")), tmp_path, **options) as second,
    ):
        await second.set_title("mine now")
        with pytest.raises(Exception, match="another process writes to this conversation"):
            await first.send_message("hello?")


# --- the ledger ---


async def test_a_message_sent_twice_with_one_op_id_is_there_once(open):
    conversation = await open(acting(say("one"), say("two")))
    first = await conversation.send_message("go", op_id=OP)
    assert await conversation.send_message("go", op_id=OP) == first
    assert (await conversation.run(timeout=PATIENCE)).final_text == "one"
    assert await conversation.send_message("go", op_id=OP) == first
    assert len(await these(conversation, UserMessage)) == 1


async def test_a_message_sent_twice_at_once_is_there_once(open):
    conversation = await open(acting(say("one"), say("two")))
    first, second = await asyncio.gather(*(conversation.send_message("go", op_id=OP) for _ in range(2)))
    assert first == second
    await conversation.run(timeout=PATIENCE)
    assert len(await these(conversation, UserMessage)) == 1


async def test_an_op_id_belongs_to_one_message(open):
    conversation = await open(acting(say("one")))
    await conversation.send_message("go", op_id=OP)
    with pytest.raises(OpMismatch):
        await conversation.send_message("stop", op_id=OP)
    with pytest.raises(OpMismatch):
        await conversation.send_message("go", op_id=OP, mode="interrupt")


# --- what a server builds on ---


async def test_listeners_get_every_event_as_json_after_its_commit(open):
    conversation = await open(acting(say("done")))
    heard, head = [], conversation.head_seq
    unsubscribe = conversation.subscribe(lambda seq, body: heard.append((seq, body)))
    await conversation.send_message("go")
    await conversation.run(timeout=PATIENCE)
    assert [decode(body) for _, body in heard] == (await past(conversation))[head:]
    assert [seq for seq, _ in heard] == list(range(head + 1, conversation.head_seq + 1))
    unsubscribe()
    await conversation.set_title("unheard")
    assert heard[-1][0] == conversation.head_seq - 1


async def test_a_listener_that_raises_takes_nothing_from_the_others(open, caplog):
    conversation = await open(acting(say("done")))
    heard = []
    conversation.subscribe(lambda seq, body: 1 / 0)
    conversation.subscribe(lambda seq, body: heard.append(seq))
    with caplog.at_level(logging.CRITICAL, logger="agent_sdk"):
        await conversation.set_title("a")
    assert heard == [conversation.head_seq]


async def test_pieces_of_answers_reach_those_who_subscribed(open):
    conversation = await open(acting(say("one two")))
    pieces = []
    unsubscribe = conversation.subscribe_deltas(pieces.append)
    accepted = await conversation.send_message("go")
    await conversation.run(timeout=PATIENCE)
    unsubscribe()
    assert "".join(piece.text for piece in pieces) == "one two"
    assert {piece.run_id for piece in pieces} == {accepted.run_id}
    assert all(piece.after_seq >= accepted.seq for piece in pieces)


LOOKUP = ToolSpec(name="lookup", description="Look up.", parameters={"type": "object"})


def with_client_tool(*steps):
    return AgentSpec(llm=ScriptedLLM(steps=steps), tools=("think",), client_tools=(LOOKUP,))


async def test_a_tool_of_a_client_is_a_durable_request_first(open):
    told = []

    async def client(request):
        told.append(request)
        return ToolResult(text="42", data={"n": 42})

    spec = with_client_tool(call("lookup", symbol="X"), say("done"))
    conversation = await open(spec, run_client_tool=client)
    await conversation.send_message("go")
    assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    opened = await these(conversation, RequestOpened)
    assert [request.request_id for request in told] == [request.request_id for request in opened]
    assert (told[0].request, told[0].tool, told[0].arguments) == ("client_tool", "lookup", '{"symbol":"X"}')
    assert [event.answer for event in await these(conversation, RequestResolved)] == ["answered"]
    result = await last_result(conversation)
    assert (result.text, result.data, result.call_id) == ("42", {"n": 42}, told[0].call_id)


async def test_a_client_that_fails_is_a_result_that_the_model_reads(open):
    async def client(request):
        raise ConnectionError("the client went away")

    conversation = await open(with_client_tool(call("lookup"), say("done")), run_client_tool=client)
    await conversation.send_message("go")
    assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    assert "the client went away" in (await last_result(conversation)).text


async def test_without_a_client_its_tools_are_answered_with_an_error(open):
    conversation = await open(with_client_tool(call("lookup"), say("done")))
    await conversation.send_message("go")
    assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    assert "there is no client" in (await last_result(conversation)).text


async def test_a_conversation_may_get_its_agent_later(open):
    conversation = await open(None)
    with pytest.raises(StateConflict, match="no agent"):
        await conversation.send_message("go")
    await conversation.configure(acting(say("done")))
    await conversation.send_message("go")
    assert (await conversation.run(timeout=PATIENCE)).final_text == "done"


async def test_configuring_the_same_agent_again_changes_nothing(open):
    agent = acting(say("done"))
    conversation = await open(agent)
    head = conversation.head_seq
    await conversation.configure(agent)
    assert conversation.head_seq == head
    await conversation.configure(agent, max_iterations=7)
    assert [event.max_iterations for event in await these(conversation, AgentConfigured)] == [500, 7]


async def test_beginning_says_which_turn_runs_or_was_the_last(open):
    gate = Gate()
    conversation = await open(acting(call("gate"), say("done"), tools=[gate.tool]))
    accepted = await conversation.send_message("go")
    await gate.reached()
    answer = await conversation.begin()
    assert (answer.run_id, answer.running) == (accepted.run_id, True)
    gate.release.set()
    await conversation.run(timeout=PATIENCE)
    answer = await conversation.begin()
    assert (answer.run_id, answer.running) == (accepted.run_id, False)
    assert answer.ended_seq == conversation.head_seq


async def test_many_conversations_share_a_log(tmp_path):
    async with EventLog.open(tmp_path / "log.sqlite") as log, AsyncExitStack() as stack:
        conversations = [
            await stack.enter_async_context(LocalConversation(acting(say(str(n))), tmp_path, log=log))
            for n in range(10)
        ]
        for conversation in conversations:
            await conversation.send_message("go")
        outcomes = await asyncio.gather(
            *(conversation.run(timeout=PATIENCE) for conversation in conversations)
        )
        assert [outcome.final_text for outcome in outcomes] == [str(n) for n in range(10)]
        assert len(await log.list()) == 10
        await conversations[0].delete()
        assert len(await log.list()) == 9


# --- trouble ---


FULL = """
import asyncio, resource, sys
from agent_sdk.definition import Agent
from agent_sdk.local.conversation import LocalConversation
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.specs import ScriptedLLM
from agent_sdk.testing import call, say
from agent_sdk.tools import tool

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

@tool
async def fill() -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
    return "x" * (3 << 20)

async def main():
    agent = Agent(llm=ScriptedLLM(steps=(call("fill"), say("done"))), tools=[fill])
    async with LocalConversation(agent, sys.argv[1], persistence_dir=sys.argv[1]) as conversation:
        await conversation.send_message("go")
        try:
            print((await conversation.run()).error)
        except StorageFull as exc:
            print(exc)
        print((await conversation.state()).state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print((await conversation.run()).final_text)
        async for event in conversation.events():
            print(event.__struct_config__.tag, getattr(event, "status", ""))

asyncio.run(main())
"""


def ran(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def test_a_turn_that_cannot_be_written_says_so_and_goes_on_when_there_is_room(tmp_path):
    """A file size limit stands in for the full disk."""
    lines = ran(FULL, str(tmp_path), "1")
    assert lines[:3] == [
        f"no space is left for the log {tmp_path / FILE_NAME}; make room and try again",
        "paused",
        "done",
    ]
    assert [line for line in lines if line.startswith("turn")] == [
        "turn_started ",
        "turn_ended interrupted",
        "turn_started ",
        "turn_ended finished",
    ]


async def test_a_result_that_finds_no_room_fails_the_turn_and_run_tries_again(tmp_path):
    lines = ran(FULL, str(tmp_path), str(2 << 20))
    assert lines[:3] == ["storage_full", "failed", "done"]
    assert lines[lines.index("model_used ") + 1 :][:3] == [
        "tool_returned ",
        "error_raised ",
        "turn_ended failed",
    ]


async def test_messages_that_come_at_every_moment_are_all_read(open):
    """Messages race with the ends of turns: each is read by the turn its answer names, and none is left."""
    conversation = await open(acting(say("ok"), repeat=True))
    receipts = []
    for number in range(60):
        receipts.append(await conversation.send_message(f"{number}a"))
        for _ in range(number):
            await asyncio.sleep(0)
        receipts.append(await conversation.send_message(f"{number}b"))
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
    read_by: dict[int, str] = {}
    for answer in await these(conversation, AgentMessage):
        for receipt in receipts:
            if receipt.seq <= answer.seen_seq:
                read_by.setdefault(receipt.seq, answer.run_id)
    assert read_by == {receipt.seq: receipt.run_id for receipt in receipts}
    assert len({receipt.run_id for receipt in receipts}) == len(await these(conversation, TurnEnded))
