"""Turns that one owner of a log leaves open and the next goes on with, without a server around them."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing

import pytest

from agent_sdk.agent.loop import RESTARTS
from agent_sdk.conversation.contract import Cursor
from agent_sdk.conversation.local import FILE_NAME, LocalConversation
from agent_sdk.conversation.log import operation, with_acceptance
from agent_sdk.conversation.store import AgentStore
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import HistoryLost
from agent_sdk.protocol.events import (
    AgentMessage,
    Interrupted,
    RequestOpened,
    RequestResolved,
    ToolReturned,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    UserMessage,
    decode,
    kind_of,
)
from agent_sdk.protocol.methods.conversation import SendMessage
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, ScriptedLLM
from agent_sdk.testing import call, calls, hang, say
from agent_sdk.tools import ToolResult, tool
from tests.contract.vocabulary import PATIENCE, Gate, acting, past, these, until

MINE = "01900000-0000-7000-8000-000000000001"


@pytest.fixture
def opening(tmp_path):
    """The conversation of one log, opened by one owner after the other."""

    def make(agent, **options):
        options = {"persistence_dir": tmp_path, "store": AgentStore(None), **options}
        return LocalConversation(agent, tmp_path, id=MINE, **options)

    return make


class Counted:
    """A tool that counts its runs; the first never ends."""

    def __init__(self, *, idempotent: bool) -> None:
        self.runs = 0
        self.entered = asyncio.Event()

        @tool(idempotent=idempotent)
        async def count() -> str:
            """Count."""
            self.runs += 1
            self.entered.set()
            if self.runs == 1:
                await asyncio.Event().wait()
            return f"run {self.runs}"

        self.tool = count


async def left(conversation, counted):
    """Let the tool begin, then leave the turn."""
    await conversation.send_message("go")
    async with asyncio.timeout(PATIENCE):
        await counted.entered.wait()
    await conversation.suspend()


async def test_a_call_of_an_idempotent_tool_is_run_again(opening):
    counted = Counted(idempotent=True)
    agent = acting(call("count"), say("done"), tools=[counted.tool])
    await left(opening(agent), counted)
    async with opening(agent) as second:
        end = await until(second, TurnEnded)
        assert (end.status, end.final_text) == ("finished", "done")
        assert [event.text for event in await these(second, ToolReturned)] == ["run 2"]


async def test_a_call_of_another_tool_is_unknown_and_not_run_again(opening):
    counted = Counted(idempotent=False)
    agent = acting(call("count"), say("done"), tools=[counted.tool])
    await left(opening(agent), counted)
    async with opening(agent) as second:
        assert (await until(second, TurnEnded)).status == "finished"
        [returned] = await these(second, ToolReturned)
        assert (returned.is_error, returned.data) == (True, {"outcome": "unknown"})
        assert counted.runs == 1


async def test_a_command_of_a_workspace_that_ended_with_its_process_is_unknown_and_not_run_again(
    opening, tmp_path
):
    os.mkfifo(tmp_path / "begun")
    command = "echo run >>runs; echo >begun; sleep 600"
    agent = acting(call("terminal", command=command), say("done"), tools=["terminal"])
    first = opening(agent)
    await first.send_message("go")
    async with asyncio.timeout(PATIENCE):
        await asyncio.to_thread((tmp_path / "begun").read_text)
    await first.suspend()
    async with opening(agent) as second:
        assert (await until(second, TurnEnded)).status == "finished"
        [returned] = await these(second, ToolReturned)
        assert (returned.is_error, returned.data) == (True, {"outcome": "unknown"})
    assert (tmp_path / "runs").read_text() == "run\n"


async def test_a_call_whose_secret_the_log_does_not_have_is_not_run_with_another_word(opening, tmp_path):
    counted = Counted(idempotent=False)
    secret = "hunter2-hunter2"
    agent = acting(
        calls(call("count"), call("terminal", command=f"echo {secret} >>ran")),
        say("done"),
        tools=["terminal", counted.tool],
    )
    first = opening(agent)
    await first.update_secrets({"TOKEN": secret})
    await left(first, counted)
    async with opening(agent) as second:
        await until(second, TurnEnded)
        returned = (await these(second, ToolReturned))[-1]
        assert returned.is_error
        assert "Not run: its arguments held a secret" in returned.text
    assert not (tmp_path / "ran").exists()


async def test_calls_behind_the_one_that_ran_had_not_begun_and_are_run(opening):
    counted = Counted(idempotent=False)
    agent = acting(calls(call("count"), call("count")), say("done"), tools=[counted.tool])
    await left(opening(agent), counted)
    async with opening(agent) as second:
        await until(second, TurnEnded)
        assert [event.text for event in await these(second, ToolReturned)][1:] == ["run 2"]


async def test_a_turn_is_one_turn_however_many_owners_it_has(opening):
    agent = acting(hang(), say("done"))
    first = opening(agent)
    await first.send_message("go")
    await until(first, TurnStarted)
    await first.suspend()
    async with opening(acting(say("done"))) as second:
        end = await until(second, TurnEnded)
        kinds = [kind_of(event) for event in await past(second)]
        assert kinds.count("turn_started") == kinds.count("turn_resumed") == kinds.count("turn_ended") == 1
        assert (await these(second, TurnResumed))[0] == (await these(second, TurnResumed))[-1]
        assert end.iterations == 1
        stats = (await second.state()).stats
    async with opening(acting(say("done"))) as third:
        assert (await third.state()).stats == stats
        assert [kind_of(event) for event in await past(third)] == kinds


async def test_a_turn_that_ends_its_owner_again_and_again_is_given_up(opening):
    agent = acting(hang())
    first = opening(agent)
    await first.send_message("go")
    await until(first, TurnStarted)
    await first.suspend()
    for generation in range(RESTARTS):
        conversation = opening(agent)
        await until(conversation, TurnResumed, generation + 1)
        await conversation.suspend()
    async with opening(agent) as last:
        end = await until(last, TurnEnded)
        assert (end.status, end.error) == ("failed", "limit_exceeded")
        assert f"{RESTARTS} processes in a row ended" in end.reason


async def test_a_turn_that_waits_for_somebody_is_never_given_up(opening):
    agent, policy = acting(call("think", thought="x"), say("done")), ConfirmationPolicy(tools=("think",))
    first = opening(agent, confirmation=policy)
    await first.send_message("go")
    asked = await until(first, RequestOpened)
    await first.suspend()
    for generation in range(RESTARTS + 2):
        conversation = opening(agent, confirmation=policy)
        await until(conversation, TurnResumed, generation + 1)
        await conversation.suspend()
    async with opening(agent, confirmation=policy) as last:
        assert [each.request_id for each in (await last.state()).pending] == [asked.request_id]
        await last.respond(asked.request_id, "approve")
        assert (await until(last, TurnEnded)).status == "finished"
        assert len(await these(last, RequestOpened)) == 1


async def test_a_call_that_is_approved_only_afterwards_had_not_begun_and_is_run(opening):
    counted = Counted(idempotent=False)
    counted.runs = 1
    agent = acting(call("count"), say("done"), tools=[counted.tool])
    policy = ConfirmationPolicy(mode="always")
    first = opening(agent, confirmation=policy)
    await first.send_message("go")
    asked = await until(first, RequestOpened)
    await first.suspend()
    async with opening(agent, confirmation=policy) as second:
        await second.respond(asked.request_id, "approve")
        await until(second, TurnEnded)
        assert [event.text for event in await these(second, ToolReturned)] == ["run 2"]


async def test_an_approval_given_before_is_obeyed_whatever_the_policy_is_now(opening):
    counted = Counted(idempotent=True)
    agent = acting(call("count"), say("done"), tools=[counted.tool])
    first = opening(agent, confirmation=ConfirmationPolicy(mode="always"))
    await first.send_message("go")
    await first.respond((await until(first, RequestOpened)).request_id, "approve")
    async with asyncio.timeout(PATIENCE):
        await counted.entered.wait()
    await first.suspend()
    async with opening(agent) as second:
        assert (await until(second, TurnEnded)).status == "finished"
        assert [event.answer for event in await these(second, RequestResolved)] == ["approved"]


async def test_a_client_tool_that_nobody_has_answered_is_delivered_again_under_its_id(opening):
    gate = Gate()
    spec = AgentSpec(
        llm=ScriptedLLM(steps=(call("gate"), say("done"))), tools=(), client_tools=(gate.tool.spec,)
    )
    asked = []

    async def never(request):
        asked.append(request.request_id)
        await asyncio.Event().wait()

    async def answer(request):
        asked.append(request.request_id)
        return ToolResult(text="from the client")

    first = opening(spec, run_client_tool=never)
    await first.send_message("go")
    await until(first, RequestOpened)
    await first.suspend()
    async with opening(spec, run_client_tool=answer) as second:
        await until(second, TurnEnded)
        assert [event.text for event in await these(second, ToolReturned)] == ["from the client"]
        assert len(await these(second, RequestOpened)) == len(await these(second, RequestResolved)) == 1
    assert len(set(asked)) == 1


async def test_winding_down_finishes_what_nobody_could_take_up(opening):
    gate = Gate()
    agent = acting(call("gate"), say("done"), tools=[gate.tool])
    first = opening(agent)
    await first.send_message("go")
    await gate.reached()
    leaving = asyncio.create_task(first.wind_down())
    gate.release.set()
    async with asyncio.timeout(PATIENCE):
        await leaving
    assert [event.text for event in await these(first, ToolReturned)] == ["through"]
    assert await these(first, TurnEnded) == []
    assert len(await these(first, AgentMessage)) == 1
    await first.suspend()
    async with opening(agent) as second:
        assert (await until(second, TurnEnded)).final_text == "done"


async def test_an_interrupted_turn_is_not_gone_on_with(opening):
    first = opening(acting(hang()))
    await first.send_message("go")
    await until(first, TurnStarted)
    await first.interrupt("enough")
    await first.suspend()
    async with opening(acting(say("done"))) as second:
        assert not second.working
        assert await these(second, TurnResumed) == []


async def test_a_stored_agent_that_this_version_cannot_make_fails_its_turn_with_a_sentence(opening, tmp_path):
    first = opening(None)
    await first.configure(acting(hang()))
    await first.send_message("go")
    await until(first, TurnStarted)
    await first.suspend()
    async with EventLog.open(tmp_path / FILE_NAME) as log:
        plain, sealed = await log.settings(MINE)
        await log.store_settings(MINE, plain.replace(b'"terminal"', b'"telepathy"'), sealed)
    async with opening(None) as second:
        end = await until(second, TurnEnded)
        assert (end.status, end.error) == ("failed", "invalid_params")
        assert "there is no built-in tool 'telepathy'" in end.reason


async def written_before_the_kill(opening, tmp_path, *steps):
    """Leave the log as a process does that is killed after these events; a message has the turn it was promised."""
    async with opening(None) as first:
        await first.configure(acting(say("hello")))
    async with EventLog.open(tmp_path / FILE_NAME) as log:
        for step in steps:
            if isinstance(step, tuple):
                text, promised = step
                message = operation(SendMessage(op_id=new_id(), text=text))
                event = UserMessage(text=text, op_id=message.op_id)
                await log.append(MINE, [event], op=with_acceptance(message, promised))
            else:
                await log.append(MINE, step)


async def test_a_message_whose_turn_had_not_started_gets_the_turn_it_was_promised(opening, tmp_path):
    await written_before_the_kill(opening, tmp_path, ("go", "promised"))
    async with opening(None) as second:
        assert (await until(second, TurnEnded)).run_id == "promised"


@pytest.mark.parametrize("status", ["finished", "interrupted", "limit", "failed", "stopped"])
async def test_a_message_that_came_while_a_turn_was_ending_gets_the_next_one(opening, tmp_path, status):
    end = [TurnEnded(run_id="before", status=status)]
    if status == "stopped":
        end = [Interrupted(), TurnEnded(run_id="before", status="interrupted")]
    await written_before_the_kill(
        opening, tmp_path, ("go", "before"), [TurnStarted(run_id="before")], ("and?", "promised"), end
    )
    async with EventLog.open(tmp_path / FILE_NAME) as log:
        assert [row.open_turn for row in await log.list()] == [""]
    async with opening(None) as second:
        ended = await until(second, TurnEnded, 2)
        assert (ended.run_id, ended.status, ended.final_text) == ("promised", "finished", "hello")


async def test_a_message_that_an_interrupted_turn_has_not_read_does_not_begin_another(opening, tmp_path):
    end = [Interrupted(), TurnEnded(run_id="before", status="interrupted")]
    await written_before_the_kill(
        opening, tmp_path, ("go", "before"), [TurnStarted(run_id="before")], ("and?", "before"), end
    )
    async with opening(None) as second:
        assert not second.working


async def test_a_message_that_a_later_turn_has_not_read_either_does_not_begin_another(opening, tmp_path):
    stopped = Interrupted()
    await written_before_the_kill(
        opening,
        tmp_path,
        ("go", "before"),
        [TurnStarted(run_id="before")],
        [stopped, TurnEnded(run_id="before", status="interrupted")],
        [TurnStarted(run_id="later"), stopped, TurnEnded(run_id="later", status="interrupted")],
    )
    async with opening(None) as second:
        assert not second.working


async def test_a_message_to_a_turn_that_is_being_paused_waits_for_run(opening, tmp_path):
    end = [TurnEnded(run_id="before", status="paused")]
    await written_before_the_kill(
        opening, tmp_path, ("go", "before"), [TurnStarted(run_id="before")], ("and?", "promised"), end
    )
    async with opening(None) as second:
        assert not second.working
        assert (await second.run(timeout=PATIENCE)).final_text == "hello"


async def test_a_promise_that_was_made_before_another_message_is_kept(opening, tmp_path):
    await written_before_the_kill(
        opening, tmp_path, ("go", "promised"), [UserMessage(text="without an op_id: nothing was promised")]
    )
    async with opening(None) as second:
        assert (await until(second, TurnEnded)).run_id == "promised"


async def test_a_conversation_opens_although_the_promise_of_its_message_cannot_be_read(opening, tmp_path):
    await written_before_the_kill(opening, tmp_path, ("go", "promised"))
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file, file:
        file.execute("UPDATE operations SET result = 'damaged'")
    async with opening(None) as second:
        assert not second.working
        assert (await second.run(timeout=PATIENCE)).final_text == "hello"


async def test_a_message_that_is_in_the_log_has_begun_its_turn_there(opening, tmp_path):
    """Killed at whatever moment, nobody has to know whether it was to wake a paused conversation."""
    async with EventLog.open(tmp_path / FILE_NAME) as log:
        conversation = opening(acting(hang(), say("done")), log=log, persistence_dir=None)
        for mode, pause in (("enqueue", True), ("interrupt", False)):
            accepted = await conversation.send_message("go", mode=mode)
            rest = await log.read(MINE, accepted.seq)
            assert [decode(body).run_id for _, body in rest[:1]] == [accepted.run_id]
            if pause:
                await conversation.pause()
                await conversation.suspend()
                conversation = opening(acting(say("done")), log=log, persistence_dir=None)
                assert (await until(conversation, TurnEnded)).status == "paused"
        await conversation.close()


async def test_the_answer_that_ends_a_turn_is_in_the_log_with_the_end(opening, tmp_path):
    async with EventLog.open(tmp_path / FILE_NAME) as log:
        agent = acting(call("think", thought="x"), say("done"), tools=["think"])
        async with opening(agent, log=log, persistence_dir=None) as conversation:
            await conversation.send_message("go")
            answer = await until(conversation, AgentMessage, 2)
            rest = [decode(body) for _, body in await log.read(MINE, answer.seq)]
            assert [kind_of(event) for event in rest] == ["model_used", "turn_ended"]


async def test_nothing_is_stored_of_a_conversation_without_settings(opening, tmp_path):
    async with opening(acting(say("done")), store=None) as conversation:
        await conversation.configure(acting(say("other")))
    async with EventLog.open(tmp_path / FILE_NAME) as log:
        assert await log.settings(MINE) is None


# --- callbacks that have seen a part ---


async def test_callbacks_get_what_they_have_not_seen_and_then_what_comes(opening):
    seen, later = [], []
    async with opening(acting(say("one")), callbacks=[seen.append]) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
        everything = await past(first)
    cut = Cursor(first.epoch, everything[2].seq)
    agent = acting(say("one"), say("two"))
    async with opening(agent, callbacks=[later.append], since=cut) as second:
        await second.send_message("2")
        await second.run(timeout=PATIENCE)
        assert [event.seq for event in later] == [event.seq for event in (await past(second))[3:]]
        assert second.cursor == Cursor(first.epoch, second.head_seq)


@pytest.mark.parametrize("cursor", [Cursor("another", 1), Cursor("", 3)])
async def test_a_cursor_of_another_history_is_refused(opening, cursor):
    async with opening(acting(say("one"))) as first:
        epoch = first.epoch
    with pytest.raises(HistoryLost) as refused:
        await opening(acting(say("one")), since=cursor).state()
    assert refused.value.details["epoch"] == epoch


async def test_a_cursor_beyond_the_end_is_refused(opening):
    async with opening(acting(say("one"))) as first:
        beyond = Cursor(first.epoch, first.head_seq + 1)
    with pytest.raises(HistoryLost):
        await opening(acting(say("one")), since=beyond).state()


async def test_an_approval_that_comes_while_the_turn_is_interrupted_is_answered_once(opening):
    counted = Counted(idempotent=True)
    agent = acting(call("count"), say("done"), tools=[counted.tool])
    async with opening(agent, confirmation=ConfirmationPolicy(mode="always")) as conversation:
        await conversation.send_message("go")
        asked = await until(conversation, RequestOpened)
        for _ in range(10):  # the turn goes on from the commit to its wait for the answer
            await asyncio.sleep(0)
        stopping = asyncio.create_task(conversation.interrupt())
        answering = asyncio.create_task(conversation.respond(asked.request_id, "approve"))
        await asyncio.gather(stopping, answering)
        assert (await until(conversation, TurnEnded)).status == "interrupted"
        assert len(await these(conversation, RequestResolved)) == 1
    assert counted.runs == 0
