"""Conversations of this process: the contract, and what only a conversation here has to promise."""

import asyncio
import logging
import threading
import uuid
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_sdk import Agent, Completion, Middleware
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.log.event_log import EventLog
from agent_sdk.models import ModelClient
from agent_sdk.protocol.errors import InvalidParams, ModelRefused, OpMismatch, StateConflict
from agent_sdk.protocol.events import (
    AgentConfigured,
    AgentMessage,
    RequestOpened,
    RequestResolved,
    TurnEnded,
    TurnStarted,
    UserMessage,
    decode,
    kind_of,
)
from agent_sdk.protocol.specs import AgentSpec, ConfirmationPolicy, ScriptedLLM, ToolSpec
from agent_sdk.testing import call, fail, hang, say
from agent_sdk.tools import ToolResult, tool
from agent_sdk.workspace.local import LocalWorkspace
from tests.contract.conversation import ConversationContract
from tests.contract.vocabulary import PATIENCE, Gate, acting, ended, last_result, past, these, until

ROOT = Path(__file__).parents[2]
OP = "01890000-0000-7000-8000-000000000001"


@pytest.fixture
async def workspace(tmp_path):
    """An entered one."""
    folder = tmp_path / "work"
    folder.mkdir()
    async with LocalWorkspace(folder) as workspace:
        yield workspace


@pytest.fixture
async def open(workspace):
    """Conversations in one folder that share a workspace."""
    async with AsyncExitStack() as stack:

        async def opened(agent, **options):
            return await stack.enter_async_context(LocalConversation(agent, workspace, **options))

        yield opened


class TestLocal(ConversationContract):
    @pytest.fixture
    def open(self, open, workspace, places):
        async def opened(agent, **options):
            conversation = await open(agent, **options)
            places[conversation] = workspace
            return conversation

        return opened


# --- opening and closing ---


async def test_a_conversation_that_is_closed_while_it_opens_accepts_nothing(workspace, tmp_path):
    options = {"id": str(uuid.uuid4()), "persistence_dir": tmp_path}
    conversation = LocalConversation(acting(say("done")), workspace, **options)
    sending = [asyncio.create_task(conversation.send_message(text)) for text in "12"]
    await asyncio.sleep(0)
    await conversation.close()
    for task in sending:
        with pytest.raises(StateConflict):
            await task
    async with LocalConversation(acting(say("done")), workspace, **options) as again:
        assert await these(again, UserMessage) == []


async def test_a_conversation_here_may_have_any_plain_name(workspace, tmp_path):
    async with LocalConversation(acting(say("done")), workspace, id="mine", persistence_dir=tmp_path) as old:
        await old.send_message("go")
        assert (await old.run(timeout=PATIENCE)).status == "finished"


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
        (AgentSpec(llm=ScriptedLLM(steps=(say("x"),)), tools=("browser",)), "browser"),
        (AgentSpec(llm=ScriptedLLM(steps=(say("x"),)), tools=("think", "think")), "think"),
    ],
)
async def test_an_agent_that_cannot_be_is_refused_at_the_first_use(tmp_path, agent, complaint):
    conversation = LocalConversation(agent, tmp_path)
    with pytest.raises(InvalidParams, match=complaint):
        await conversation.send_message("go")
    await conversation.close()


# --- calls that come again ---


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


async def test_a_message_that_comes_again_begins_no_turn_that_others_wait_for(open):
    conversation = await open(acting(say("one"), say("two")))
    first = await conversation.send_message("go", op_id=OP)
    await conversation.run(timeout=PATIENCE)
    again = asyncio.create_task(conversation.send_message("go", op_id=OP))
    await asyncio.wait([again], timeout=0)  # it is on its way to the log
    answer = await conversation.begin()
    assert (answer.run_id, answer.running, await again) == (first.run_id, False, first)


async def test_who_waits_while_a_message_comes_again_hears_of_the_turn_that_answers_the_next_one(open):
    conversation = await open(acting(say("one"), say("two")))
    await conversation.send_message("go", op_id=OP)
    await conversation.run(timeout=PATIENCE)
    sent = [
        asyncio.create_task(conversation.send_message("go", op_id=OP)),
        asyncio.create_task(conversation.send_message("more")),
    ]
    await asyncio.wait(sent, timeout=0)  # both are on their way to the log
    assert (await conversation.run(timeout=PATIENCE)).final_text == "two"
    await asyncio.gather(*sent)


async def test_a_message_is_answered_that_comes_while_a_turn_is_stopped_whose_message_had_come_before(open):
    conversation = await open(acting(say("one"), say("two")))
    await conversation.send_message("go", op_id=OP)
    await conversation.run(timeout=PATIENCE)
    again = asyncio.create_task(conversation.send_message("go", op_id=OP))
    stopped = asyncio.create_task(conversation.interrupt("no"))
    more = asyncio.create_task(conversation.send_message("more"))
    await asyncio.gather(again, stopped, more)
    assert (await until(conversation, TurnEnded, 2)).run_id == more.result().run_id


async def test_no_pause_is_asked_of_a_turn_whose_message_had_come_before(open):
    conversation = await open(acting(say("one")))
    await conversation.send_message("go", op_id=OP)
    await conversation.run(timeout=PATIENCE)
    again, head = asyncio.create_task(conversation.send_message("go", op_id=OP)), conversation.head_seq
    await asyncio.wait([again], timeout=0)
    await conversation.pause()
    assert (await again, conversation.head_seq) == (await conversation.send_message("go", op_id=OP), head)


async def test_a_message_that_is_refused_keeps_nobody_from_hearing_how_the_turn_failed(open):
    conversation = await open(acting(say("one"), fail("model_refused"), say("two")))
    await conversation.send_message("go", op_id=OP)
    await conversation.run(timeout=PATIENCE)
    await conversation.send_message("more")
    await until(conversation, TurnEnded, 2)
    with pytest.raises(OpMismatch):
        await conversation.send_message("other", op_id=OP)
    assert (await conversation.run(timeout=PATIENCE)).status == "failed"


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


async def test_messages_that_meet_the_end_of_a_turn_are_answered(open):
    """Each is sent some steps of the event loop after the turn has its answer, while it writes its end."""
    conversation = await open(acting(say("ok"), repeat=True))
    for steps in range(40):
        late = []

        async def send(steps=steps, late=late):
            for _ in range(steps):
                await asyncio.sleep(0)
            late.append(await conversation.send_message("late"))

        tasks = []

        def meet(seq, body, send=send, tasks=tasks):
            if not tasks and body.startswith(b'{"type":"agent_message"'):
                tasks.append(asyncio.create_task(send()))

        unsubscribe = conversation.subscribe(meet)
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        await asyncio.gather(*tasks)
        unsubscribe()
        await until_answered(conversation, late[0])


async def until_answered(conversation, receipt):
    """Returns when the turn that was promised to answer has ended, without asking it to run."""
    async with asyncio.timeout(PATIENCE):
        async for event in conversation.events(since=receipt.seq, follow=True):
            if isinstance(event, TurnEnded) and event.run_id == receipt.run_id:
                return


async def test_a_turn_begins_after_the_end_of_the_one_before_whatever_meets(open):
    for steps in range(15):
        gate = Gate()
        conversation = await open(acting(call("gate"), say("ok"), tools=[gate.tool]))
        await conversation.send_message("go")
        await gate.reached()
        meeting = [
            asyncio.create_task(conversation.set_title("x")),
            asyncio.create_task(conversation.interrupt()),
        ]
        for _ in range(steps):
            await asyncio.sleep(0)
        receipt = await conversation.send_message("late")
        await asyncio.gather(*meeting)
        await conversation.run(timeout=PATIENCE)
        kinds = [kind_of(event) for event in await past(conversation) if kind_of(event).startswith("turn_")]
        assert kinds == ["turn_started", "turn_ended"] * (len(kinds) // 2)
        assert (await ended(conversation)).run_id == receipt.run_id


async def test_running_in_the_moment_of_a_pause_goes_on(open):
    for steps in range(5):
        gate = Gate()
        conversation = await open(acting(call("gate"), say("done"), tools=[gate.tool]))
        again = []

        async def run(steps=steps, conversation=conversation):
            for _ in range(steps):
                await asyncio.sleep(0)
            return await conversation.run(timeout=PATIENCE)

        def paused(seq, body, again=again, run=run):
            if body.startswith(b'{"type":"turn_ended"') and not again:
                again.append(asyncio.create_task(run()))

        conversation.subscribe(paused)
        await conversation.send_message("go")
        await gate.reached()
        await conversation.pause()
        gate.release.set()
        await conversation.run(timeout=PATIENCE)
        assert (await again[0]).status == "finished"


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


NO_SECRETS = [{"no name": "x"}, {"NAME": "a\0b"}, {"NAME": "x" * 40_000}]


@pytest.mark.parametrize("secrets", NO_SECRETS)
async def test_secrets_that_are_refused_before_there_is_an_agent_keep_none_from_coming(open, secrets):
    conversation = await open(None)
    with pytest.raises(InvalidParams, match="^secrets: "):
        await conversation.update_secrets(secrets)
    await conversation.configure(acting(say("done")))
    await conversation.send_message("go")
    assert (await conversation.run()).final_text == "done"


@pytest.mark.parametrize("secrets", NO_SECRETS)
async def test_an_agent_that_is_refused_for_its_secrets_leaves_the_one_before(open, secrets):
    conversation = await open(acting(say("one")))
    with pytest.raises(InvalidParams, match="^secrets: "):
        await conversation.configure(acting(say("two")), max_iterations=7, secrets=secrets)
    await conversation.set_confirmation_policy(ConfirmationPolicy())
    configured = [event for event in await past(conversation) if isinstance(event, AgentConfigured)]
    assert [event.max_iterations for event in configured] == [500, 500]
    await conversation.send_message("go")
    assert (await conversation.run()).final_text == "one"


async def test_what_is_written_beside_an_answer_lets_out_no_half_of_a_secret():
    value = "hunter2-hunter2-correct-horse"
    shown: list[str] = []
    half = asyncio.Event()
    further = asyncio.Event()

    class Slow(ModelClient):
        async def complete(self, request, *, on_delta=None):
            on_delta(f"it is {value[:15]}", "")
            half.set()
            await further.wait()
            on_delta(f"{value[15:]} ok", "")
            return Completion(text=f"it is {value} ok")

    class Slowly(Middleware, frozen=True):
        async def before_model(self, turn, request):
            return replace(request, client=Slow())

    agent = Agent(llm=ScriptedLLM(steps=(say("x"),)), middleware=[Slowly()])
    secrets = {"KEY": value}
    async with LocalConversation(
        agent, secrets=secrets, on_delta=lambda delta: shown.append(delta.text)
    ) as conversation:
        await conversation.send_message("go")
        await half.wait()
        await conversation.set_title("new")
        further.set()
        await conversation.run(timeout=PATIENCE)
    assert "".join(shown) == "it is <secret-hidden> ok"


@pytest.mark.parametrize("how", ["interrupt", "fail", "limit"])
async def test_an_answer_that_is_broken_off_shows_no_beginning_of_a_secret(how):
    value = "hunter2-hunter2-correct-horse"
    shown: list[str] = []
    half = asyncio.Event()
    asked: list[object] = []

    class Breaking(ModelClient):
        async def complete(self, request, *, on_delta=None):
            asked.append(request)
            if len(asked) > 1:
                on_delta(f"{value[15:]} ok", "")
                return Completion(text=f"{value[15:]} ok")
            on_delta(f"it is {value[:9]}", f"hm {value[:9]}")
            on_delta(value[9:15], "")
            half.set()
            if how == "limit":
                return Completion(text=f"it is {value[:15]}", finish_reason="length")
            if how == "fail":
                raise ModelRefused("no more")
            return await asyncio.Event().wait()

    class Badly(Middleware, frozen=True):
        async def before_model(self, turn, request):
            return replace(request, client=Breaking())

    def listen(delta):
        shown.extend((delta.text, delta.thinking))

    agent = Agent(llm=ScriptedLLM(steps=(say("x"),)), middleware=[Badly()])
    async with LocalConversation(agent, secrets={"KEY": value}, on_delta=listen) as conversation:
        await conversation.send_message("go")
        await half.wait()
        if how == "interrupt":
            await conversation.interrupt()
            await conversation.send_message("go on")
        outcome = await conversation.run(timeout=PATIENCE)
        events = [event async for event in conversation.events()]
    assert how == "fail" or outcome.final_text.endswith("<secret-hidden> ok")
    everything = "".join(shown) + repr(events) + repr(outcome)
    assert "it is <secret-hidden>" in everything
    assert "hunt" not in everything
    assert "horse" not in everything


async def test_a_message_that_comes_while_an_interrupt_still_stops_the_turn_is_answered():
    entered, stopping, may_end = (asyncio.Event() for _ in range(3))

    @tool
    async def slow() -> str:
        """Take a moment to end."""
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopping.set()
            await may_end.wait()
        return ""

    agent = Agent(llm=ScriptedLLM(steps=(call("slow"), say("second"))), tools=[slow])
    async with LocalConversation(agent) as conversation:
        await conversation.send_message("first")
        await entered.wait()
        interrupting = asyncio.create_task(conversation.interrupt())
        await stopping.wait()
        await conversation.send_message("second")
        may_end.set()
        await interrupting
        assert (await until(conversation, TurnEnded, count=2)).final_text == "second"
