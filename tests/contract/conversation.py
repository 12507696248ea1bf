"""What every conversation promises, wherever its agent runs.

A subclass provides the fixture `open`: a coroutine function `open(agent, **options)` that returns a new
Conversation in a folder, with the options of api.Conversation, and notes in `places` the entered workspace where
its commands run; the fixture closes what was opened.
"""

import asyncio
import uuid

import pytest

from agent_sdk.protocol.errors import InvalidParams, OpMismatch, StateConflict, TimedOut
from agent_sdk.protocol.events import (
    AgentMessage,
    ErrorRaised,
    Event,
    Interrupted,
    ModelFailed,
    RequestOpened,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    TurnStarted,
    UserMessage,
    kind_of,
)
from agent_sdk.protocol.specs import ScriptedLLM
from agent_sdk.testing import call, calls, fail, hang, say
from tests.contract.tool_calls import ToolCallsContract
from tests.contract.vocabulary import (
    ASKS,
    PATIENCE,
    Gate,
    Open,
    Places,
    acting,
    approved,
    ended,
    no_longer_runs,
    past,
    these,
    until,
)


class ConversationContract(ToolCallsContract):
    """See the module's docstring."""

    @pytest.fixture
    def places(self) -> Places:
        """The workspace of each conversation that was opened."""
        return {}

    # --- messages and turns ---

    @pytest.mark.place
    async def test_a_message_is_answered(self, open: Open) -> None:
        conversation = await open(acting(say("Hello.")))
        accepted = await conversation.send_message("Hi")
        outcome = await conversation.run(timeout=PATIENCE)
        assert (outcome.status, outcome.final_text, outcome.run_id) == ("finished", "Hello.", accepted.run_id)

    async def test_the_answer_to_a_message_names_its_event(self, open: Open) -> None:
        conversation = await open(acting(say("Hello.")))
        accepted = await conversation.send_message("Hi")
        [event] = [event for event in await past(conversation) if event.seq == accepted.seq]
        assert isinstance(event, UserMessage)
        assert event.text == "Hi"

    @pytest.mark.place
    async def test_a_turn_is_a_sequence_of_events(self, open: Open) -> None:
        conversation = await open(acting(call("terminal", command="echo hi"), say("Done.")))
        await conversation.send_message("Say hi")
        await conversation.run(timeout=PATIENCE)
        kinds = [kind_of(event) for event in await past(conversation)]
        # A container tells that it starts, and that this takes long.
        kinds = [kind for kind in kinds if kind not in ("workspace_changed", "waiting")]
        assert kinds[:2] == ["conversation_created", "agent_configured"]
        assert kinds[kinds.index("user_message") :] == [
            "user_message",
            "turn_started",
            "agent_message",
            "tool_called",
            "model_used",
            "tool_returned",
            "agent_message",
            "model_used",
            "turn_ended",
        ]

    async def test_the_seqs_of_events_have_no_gaps(self, open: Open) -> None:
        conversation = await open(acting(call("think", thought="hm"), say("Done.")))
        await conversation.send_message("Think")
        await conversation.run(timeout=PATIENCE)
        seqs = [event.seq for event in await past(conversation)]
        assert seqs == list(range(1, len(seqs) + 1))

    async def test_a_turn_ends_when_the_agent_calls_finish(self, open: Open) -> None:
        conversation = await open(acting(call("finish", message="All done."), say("never said")))
        await conversation.send_message("Finish")
        outcome = await conversation.run(timeout=PATIENCE)
        assert (outcome.status, outcome.final_text) == ("finished", "All done.")

    async def test_a_second_message_starts_a_second_turn(self, open: Open) -> None:
        conversation = await open(acting(say("one"), say("two")))
        first = await conversation.send_message("1")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "one"
        second = await conversation.send_message("2")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "two"
        assert first.run_id != second.run_id

    async def test_running_again_with_nothing_to_do_returns_the_last_outcome(self, open: Open) -> None:
        conversation = await open(acting(say("one"), say("two")))
        await conversation.send_message("1")
        outcome = await conversation.run(timeout=PATIENCE)
        assert await conversation.run(timeout=PATIENCE) == outcome

    async def test_running_before_the_first_message_is_a_conflict(self, open: Open) -> None:
        conversation = await open(acting(say("one")))
        with pytest.raises(StateConflict):
            await conversation.run(timeout=PATIENCE)

    async def test_a_message_that_is_repeated_under_its_op_id_is_one_message(self, open: Open) -> None:
        conversation, op_id = await open(acting(say("one"), say("two"))), str(uuid.uuid4())
        first = await conversation.send_message("1", op_id=op_id)
        await conversation.run(timeout=PATIENCE)
        assert await conversation.send_message("1", op_id=op_id) == first
        with pytest.raises(OpMismatch):
            await conversation.send_message("2", op_id=op_id)
        with pytest.raises(InvalidParams, match="op_id: expected a UUID"):
            await conversation.send_message("2", op_id="mine")
        assert [event.text for event in await these(conversation, UserMessage)] == ["1"]

    async def test_an_empty_message_is_refused(self, open: Open) -> None:
        conversation = await open(acting(say("one")))
        with pytest.raises(InvalidParams, match="text"):
            await conversation.send_message(" \n")

    async def test_a_message_sent_while_the_agent_works_joins_the_turn(self, open: Open) -> None:
        gate = Gate()
        conversation = await open(acting(call("gate"), say("both"), tools=[gate.tool]))
        first = await conversation.send_message("one")
        await gate.reached()
        second = await conversation.send_message("two")
        gate.release.set()
        outcome = await conversation.run(timeout=PATIENCE)
        assert first.run_id == second.run_id == outcome.run_id
        assert outcome.final_text == "both"
        assert len(await these(conversation, TurnStarted)) == 1

    async def test_a_turn_does_not_end_while_a_message_is_unread(self, open: Open) -> None:
        gate = Gate()
        finishing = calls(call("gate"), call("finish", message="first"))
        conversation = await open(acting(finishing, say("second"), tools=[gate.tool, "finish"]))
        await conversation.send_message("one")
        await gate.reached()
        await conversation.send_message("two")
        gate.release.set()
        assert (await conversation.run(timeout=PATIENCE)).final_text == "second"
        assert len(await these(conversation, TurnStarted)) == 1

    async def test_waiting_for_a_turn_can_have_an_end_that_the_turn_does_not_notice(self, open: Open) -> None:
        gate = Gate()
        conversation = await open(acting(call("gate"), say("done"), tools=[gate.tool]))
        await conversation.send_message("go")
        await gate.reached()
        with pytest.raises(TimedOut):
            await conversation.run(timeout=0.01)
        gate.release.set()
        assert (await conversation.run(timeout=PATIENCE)).final_text == "done"

    # --- callbacks and events ---

    async def test_callbacks_see_every_event_once_and_in_order(self, open: Open) -> None:
        heard: list[Event] = []
        heard_later: list[Event] = []

        async def slow(event: Event) -> None:
            await asyncio.sleep(0)
            heard_later.append(event)

        conversation = await open(
            acting(call("think", thought="hm"), say("Done.")), callbacks=[heard.append, slow]
        )
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        events = await past(conversation)
        assert heard == events
        assert heard_later == events

    @pytest.mark.parametrize("error", [RuntimeError("broken callback"), asyncio.CancelledError()], ids=repr)
    async def test_a_callback_that_raises_stops_nothing(self, open: Open, error: BaseException) -> None:
        heard: list[Event] = []

        def broken(event: object) -> None:
            raise error

        async def broken_later(event: object) -> None:
            raise error

        callbacks = [broken, broken_later, heard.append]
        conversation = await open(acting(say("Done.")), callbacks=callbacks, on_delta=broken)
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        assert heard == await past(conversation)

    async def test_a_callback_that_waits_does_not_hold_up_who_reads_the_events(self, open: Open) -> None:
        read = asyncio.Event()

        async def wait(event: Event) -> None:
            if isinstance(event, UserMessage):
                await read.wait()

        conversation = await open(acting(say("Done.")), callbacks=[wait])
        await conversation.send_message("go")
        await until(conversation, TurnEnded)
        read.set()
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"

    async def test_streamed_pieces_add_up_to_the_answer(self, open: Open) -> None:
        pieces: list[str] = []
        conversation = await open(
            acting(say("one two three")), on_delta=lambda delta: pieces.append(delta.text)
        )
        await conversation.send_message("count")
        await conversation.run(timeout=PATIENCE)
        assert "".join(pieces) == "one two three"

    async def test_events_can_be_read_from_any_point(self, open: Open) -> None:
        conversation = await open(acting(say("Done.")))
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        events = await past(conversation)
        assert [event async for event in conversation.events(since=3)] == events[3:]
        assert [event async for event in conversation.events(since=len(events))] == []

    async def test_following_goes_on_with_what_comes(self, open: Open) -> None:
        conversation = await open(acting(say("one"), say("two")))
        await conversation.send_message("1")
        await conversation.run(timeout=PATIENCE)
        following = asyncio.create_task(until(conversation, TurnEnded, count=2))
        await conversation.send_message("2")
        assert (await following).final_text == "two"

    # --- stopping and going on ---

    async def test_a_paused_turn_stops_before_its_next_step_and_goes_on_with_run(self, open: Open) -> None:
        conversation = await open(acting(call("terminal", command="true"), say("done")), confirmation=ASKS)
        await conversation.send_message("go")
        await until(conversation, RequestOpened)
        await conversation.pause()
        assert (await approved(conversation)).status == "paused"
        assert (await conversation.state()).state == "paused"
        assert len(await these(conversation, AgentMessage)) == 1
        outcome = await conversation.run(timeout=PATIENCE)
        assert (outcome.status, outcome.final_text) == ("finished", "done")

    async def test_a_message_does_not_wake_a_paused_conversation(self, open: Open) -> None:
        conversation = await open(acting(call("terminal", command="true"), say("done")), confirmation=ASKS)
        await conversation.send_message("go")
        await until(conversation, RequestOpened)
        await conversation.pause()
        await approved(conversation)
        accepted = await conversation.send_message("more")
        assert (await conversation.state()).state == "paused"
        assert (await conversation.run(timeout=PATIENCE)).run_id == accepted.run_id

    async def test_an_interrupt_drops_a_model_call_that_hangs(self, open: Open) -> None:
        conversation = await open(acting(hang()))
        await conversation.send_message("go")
        await until(conversation, TurnStarted)
        async with asyncio.timeout(PATIENCE):
            await conversation.interrupt("enough")
        assert (await conversation.run(timeout=PATIENCE)).status == "interrupted"
        assert [event.reason for event in await these(conversation, Interrupted)] == ["enough"]
        await conversation.switch_llm(ScriptedLLM(steps=(say("after"),)))
        await conversation.send_message("again")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "after"

    async def test_what_had_come_of_an_answer_that_is_interrupted_stays(self, open: Open) -> None:
        begun = asyncio.Event()
        conversation = await open(
            acting(hang(saying="Once upon a"), say("never said"), say("after")),
            on_delta=lambda _: begun.set(),
        )
        await conversation.send_message("tell a story")
        await asyncio.wait_for(begun.wait(), PATIENCE)
        await conversation.interrupt()
        [message] = await these(conversation, AgentMessage)
        assert (message.text, message.finish_reason, message.tool_calls) == ("Once upon a", "interrupted", 0)
        outcome = await conversation.run(timeout=PATIENCE)
        assert (outcome.status, outcome.final_text, outcome.finish_reason) == (
            "interrupted",
            "",
            "interrupted",
        )
        await conversation.send_message("another one")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "after"

    @pytest.mark.place
    @pytest.mark.parametrize("first", ["true", "trap '' INT"], ids=["obedient", "stubborn"])
    async def test_an_interrupt_ends_the_command_under_way_with_its_process(
        self, open: Open, places: Places, first: str
    ) -> None:
        command = f'bash -c "{first}; echo \\$\\$ > pid; exec sleep 3600"'
        conversation = await open(acting(call("terminal", command=command), say("after")))
        workspace = places[conversation]
        await conversation.send_message("go")
        async with asyncio.timeout(PATIENCE):
            await workspace.execute("until [ -s pid ]; do sleep 0.01; done")
            await conversation.interrupt()
            await no_longer_runs(workspace)
        assert (await ended(conversation)).status == "interrupted"

    async def test_a_call_that_is_interrupted_gets_an_error_as_its_result(self, open: Open) -> None:
        gate = Gate()
        several = calls(call("think", thought="hm"), call("gate"), call("think", thought="never"))
        conversation = await open(acting(several, say("after"), tools=["think", gate.tool]))
        await conversation.send_message("go")
        await gate.reached()
        await conversation.interrupt()
        called = [event.call_id for event in await these(conversation, ToolCalled)]
        returned = await these(conversation, ToolReturned)
        assert [event.call_id for event in returned] == called
        assert [event.is_error for event in returned] == [False, True, True]
        assert "interrupted" in returned[1].text
        await conversation.send_message("go on")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "after"

    async def test_a_message_may_interrupt_the_turn_and_start_another(self, open: Open) -> None:
        gate = Gate()
        conversation = await open(acting(call("gate"), say("after"), tools=[gate.tool]))
        first = await conversation.send_message("go")
        await gate.reached()
        second = await conversation.send_message("stop, do this", mode="interrupt")
        outcome = await conversation.run(timeout=PATIENCE)
        assert first.run_id != second.run_id == outcome.run_id
        assert [event.status for event in await these(conversation, TurnEnded)] == ["interrupted", "finished"]

    async def test_a_turn_has_a_limit_and_goes_on_with_run(self, open: Open) -> None:
        working = acting(call("terminal", command="true"), repeat=True)
        conversation = await open(working, max_iterations=3, confirmation=ASKS)
        await conversation.send_message("go")
        assert (await approved(conversation)).status == "limit"
        assert (await ended(conversation)).iterations == 3
        assert (await approved(conversation)).status == "limit"
        assert len(await these(conversation, AgentMessage)) == 6

    async def test_finishing_in_the_last_step_is_finishing(self, open: Open) -> None:
        conversation = await open(acting(call("think", thought="hm"), say("done")), max_iterations=2)
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"

    # --- the model ---

    async def test_a_model_that_refuses_fails_the_turn_and_run_tries_again(self, open: Open) -> None:
        conversation = await open(acting(fail("model_refused", "too long"), say("now")))
        await conversation.send_message("go")
        await until(conversation, TurnEnded)
        outcome = await conversation.run(timeout=PATIENCE)
        assert (outcome.status, outcome.error) == ("failed", "model_refused")
        [raised] = await these(conversation, ErrorRaised)
        assert (raised.error, raised.message, raised.classification) == ("model_refused", "too long", "model")
        assert (await conversation.state()).state == "failed"
        assert (await conversation.run(timeout=PATIENCE)).final_text == "now"

    async def test_an_end_that_came_while_nobody_waited_is_told_before_anything_is_tried_again(
        self, open: Open
    ) -> None:
        gate = Gate()
        steps = [call("gate"), fail("model_refused"), fail("model_refused"), say("now")]
        conversation = await open(acting(*steps, tools=[gate.tool]))
        await conversation.send_message("go")
        with pytest.raises(TimedOut):
            await conversation.run(timeout=0.01)
        await gate.reached()
        gate.release.set()
        await until(conversation, TurnEnded)
        outcomes = [await conversation.run(timeout=PATIENCE) for _ in range(3)]
        assert [outcome.status for outcome in outcomes] == ["failed", "failed", "finished"]
        assert len({outcome.run_id for outcome in outcomes}) == 3

    async def test_a_model_that_fails_for_a_while_is_asked_again(self, open: Open) -> None:
        conversation = await open(acting(fail("model_unavailable"), fail("model_rate_limited"), say("now")))
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "now"
        failures = await these(conversation, ModelFailed)
        assert [(event.error, event.attempt) for event in failures] == [
            ("model_unavailable", 1),
            ("model_rate_limited", 2),
        ]
        assert all(event.retry_in is not None for event in failures)

    async def test_the_model_can_be_switched(self, open: Open) -> None:
        conversation = await open(acting(say("one")))
        await conversation.send_message("1")
        await conversation.run(timeout=PATIENCE)
        await conversation.switch_llm(ScriptedLLM(steps=(say("unused"), say("other")), model="scripted-2"))
        await conversation.send_message("2")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "other"
        assert (await conversation.state()).model == "scripted-2"

    async def test_what_was_consumed_is_counted(self, open: Open) -> None:
        several = calls(call("think", thought="a"), call("think", thought="b"))
        conversation = await open(acting(several, say("done")))
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        stats = await conversation.stats()
        assert (stats.turns, stats.model_calls, stats.tool_calls) == (1, 2, 2)
        assert stats.input_tokens > stats.output_tokens > 0
        assert (await conversation.state()).stats == stats

    # --- names, the end ---

    async def test_title_and_tags_are_kept_and_tags_are_merged(self, open: Open) -> None:
        conversation = await open(acting(say("done")), title="First", tags={"a": "1"})
        await conversation.set_title(tags={"b": "2"})
        await conversation.set_title("Second", tags={"a": "3"})
        snapshot = await conversation.state()
        assert (snapshot.title, snapshot.tags) == ("Second", {"a": "3", "b": "2"})

    @pytest.mark.place
    async def test_a_deleted_conversation_is_closed(self, open: Open) -> None:
        conversation = await open(acting(hang(), say("done")))
        await conversation.send_message("go")
        await until(conversation, TurnStarted)
        async with asyncio.timeout(PATIENCE):
            await conversation.delete()
        with pytest.raises(StateConflict):
            await conversation.send_message("more")
