"""What every conversation promises of the calls its agent makes: tools, approvals, secrets."""

import asyncio
import os
from typing import Any

import pytest

from agent_sdk.conversation.contract import Conversation, Wait
from agent_sdk.protocol.errors import InvalidParams, RequestNotFound, TimedOut, TurnWaits
from agent_sdk.protocol.events import (
    Event,
    RequestOpened,
    RequestResolved,
    SecretsChanged,
    ToolReturned,
    encode,
)
from agent_sdk.protocol.specs import ConfirmationPolicy
from agent_sdk.testing import call, calls, say
from agent_sdk.tools import tool
from tests.contract.vocabulary import PATIENCE, Open, acting, last_result, past, these, until

ALWAYS = ConfirmationPolicy(mode="always")


class ToolCallsContract:
    """Part of the ConversationContract; see there."""

    # --- tools ---

    @pytest.mark.place
    async def test_a_python_function_runs_in_the_process_of_its_owner(self, open: Open) -> None:
        pids: list[int] = []

        @tool
        def where(question: str) -> dict[str, int]:
            """Say where this runs."""
            pids.append(os.getpid())
            return {"pid": os.getpid()}

        conversation = await open(acting(call("where", question="?"), say("done"), tools=[where]))
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        assert pids == [os.getpid()]
        assert (await last_result(conversation)).text == f'{{"pid":{os.getpid()}}}'

    async def test_what_a_function_raises_is_read_by_the_model(self, open: Open) -> None:
        @tool
        async def broken() -> str:
            """Break."""
            raise KeyError("no such symbol")

        conversation = await open(acting(call("broken"), say("done"), tools=[broken]))
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        result = await last_result(conversation)
        assert result.is_error
        assert "no such symbol" in result.text

    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "async"])
    async def test_a_function_can_end_its_call_and_nothing_else_whatever_it_raises(
        self, open: Open, plain: bool
    ) -> None:
        class Silent(Exception):
            def __str__(self) -> str:
                raise ValueError

        raised = [
            SystemExit(2),
            KeyboardInterrupt(),
            GeneratorExit(),
            asyncio.CancelledError(),
            StopIteration(),
        ]
        raised += [BaseExceptionGroup("several", [SystemExit(3)]), Silent(), ValueError("a\ud800")]
        names = [type(one).__name__ for one in raised]

        def act() -> str:
            """Fail."""
            raise raised.pop(0)

        async def act_async() -> str:
            """Fail."""
            raise raised.pop(0)

        broken = tool(act, name="broken") if plain else tool(act_async, name="broken")
        conversation = await open(acting(*[call("broken")] * len(names), say("done"), tools=[broken]))
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "done"
        results = [event for event in await past(conversation) if isinstance(event, ToolReturned)]
        assert all(result.is_error for result in results)
        for result, name in zip(results, names, strict=True):
            assert name in result.text or (name == "StopIteration" and "StopIteration" in result.text)

    async def test_what_a_function_returns_is_made_text_that_utf8_can_say(self, open: Open) -> None:
        returned = [os.fsdecode(b"bad\xff.txt"), b"bad\xff", bytearray(b"ok"), {"a": 1}, None]

        @tool
        def give() -> Any:
            """Give the next one."""
            return returned.pop(0)

        conversation = await open(acting(*[call("give")] * len(returned), say("done"), tools=[give]))
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "done"
        results = [event for event in await past(conversation) if isinstance(event, ToolReturned)]
        assert [result.text for result in results] == ["bad\ufffd.txt", "bad\ufffd", "ok", '{"a":1}', "done"]

    async def test_a_tool_that_does_not_exist_is_answered_with_those_that_do(self, open: Open) -> None:
        conversation = await open(acting(call("browser", url="x"), say("done"), tools=["think", "finish"]))
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        result = await last_result(conversation)
        assert result.is_error
        assert "think, finish" in result.text

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            ({"command": "view"}, "path"),
            ({"command": "view", "path": 3}, "path"),
            ({"command": "fly"}, "command"),
        ],
        ids=["missing", "wrong type", "wrong value"],
    )
    async def test_wrong_arguments_are_answered_with_the_name_of_the_field(
        self, open: Open, arguments: dict[str, Any], field: str
    ) -> None:
        conversation = await open(acting(call("file_editor", **arguments), say("done")))
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        result = await last_result(conversation)
        assert result.is_error
        assert field in result.text

    async def test_results_come_in_the_order_of_the_calls(self, open: Open) -> None:
        second_ran = asyncio.Event()

        @tool(read_only=True)
        async def slow() -> str:
            """Wait for the other."""
            await second_ran.wait()
            return "slow"

        @tool(read_only=True)
        async def quick() -> str:
            """Let the other go on."""
            second_ran.set()
            return "quick"

        conversation = await open(
            acting(calls(call("slow"), call("quick")), say("done"), tools=[slow, quick])
        )
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        assert [event.text for event in await these(conversation, ToolReturned)] == ["slow", "quick"]

    async def test_a_very_long_result_arrives_with_its_beginning_its_end_and_the_size_of_the_gap(
        self, open: Open
    ) -> None:
        size = 40 << 20

        @tool
        async def flood() -> str:
            """Say a lot."""
            return "<" + "x" * (size - 2) + ">"

        heard: list[Event] = []
        conversation = await open(acting(call("flood"), say("done"), tools=[flood]), callbacks=[heard.append])
        await conversation.send_message("go")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        [returned] = [event for event in heard if isinstance(event, ToolReturned)]
        assert len(returned.text) + returned.bytes_cut == size
        assert len(returned.text) == 32 << 20
        assert (returned.text[0], returned.text[-1]) == ("<", ">")

    # --- approvals ---

    async def test_an_approved_call_runs(self, open: Open) -> None:
        policy = ConfirmationPolicy(mode="writes")
        conversation = await open(
            acting(call("terminal", command="echo ran"), say("done")), confirmation=policy
        )
        await conversation.send_message("go")
        request = await until(conversation, RequestOpened)
        snapshot = await conversation.state()
        assert snapshot.state == "awaiting"
        assert [pending.request_id for pending in snapshot.pending] == [request.request_id]
        assert await these(conversation, ToolReturned) == []
        await conversation.respond(request.request_id, "approve")
        assert (await conversation.run(timeout=PATIENCE)).status == "finished"
        assert (await last_result(conversation)).text.startswith("ran\n")

    async def test_run_tells_its_caller_that_an_approval_is_waited_for(self, open: Open) -> None:
        conversation = await open(
            acting(call("terminal", command="echo hi"), say("done")), confirmation=ALWAYS
        )
        await conversation.send_message("go")
        waits: list[Wait] = []

        async def approve(wait: Wait) -> None:
            if wait.what == "box":  # its start takes long when the machine is busy
                return
            waits.append(wait)
            assert wait in (await conversation.state()).waits
            assert wait.request_id
            await conversation.respond(wait.request_id, "approve")

        assert (await conversation.run(timeout=PATIENCE, on_waiting=approve)).final_text == "done"
        [request] = await these(conversation, RequestOpened)
        assert [(wait.what, wait.tool, wait.request_id) for wait in waits] == [
            ("approval", "terminal", request.request_id)
        ]

    async def test_run_ends_instead_of_waiting_for_somebody_where_its_caller_wants_that(
        self, open: Open
    ) -> None:
        conversation = await open(
            acting(call("terminal", command="echo hi"), say("done")), confirmation=ALWAYS, on_waiting="raise"
        )
        await conversation.send_message("go")
        with pytest.raises(TurnWaits, match="whether terminal may run") as waits:
            await conversation.run(timeout=PATIENCE)
        await conversation.respond(waits.value.details["request_id"], "approve")
        outcome = await conversation.run(timeout=PATIENCE, on_waiting=lambda wait: None)
        assert outcome.final_text == "done"

    async def test_what_is_raised_when_the_time_of_run_is_over_says_what_the_turn_waits_for(
        self, open: Open
    ) -> None:
        conversation = await open(
            acting(call("terminal", command="echo hi"), say("done")), confirmation=ALWAYS
        )
        await conversation.send_message("go")
        await until(conversation, RequestOpened)
        with pytest.raises(TimedOut, match="whether terminal may run"):
            await conversation.run(timeout=0.05)

    async def test_an_approval_is_in_the_log_before_the_call_runs(self, open: Open) -> None:
        conversations: list[Conversation] = []
        seen: list[Any] = []

        @tool
        async def look() -> str:
            """Look into the log."""
            pending = (await conversations[0].state()).pending
            seen.append([each.request for each in pending if each.request == "approval"])
            seen.extend(event.answer for event in await these(conversations[0], RequestResolved))
            return "looked"

        policy = ConfirmationPolicy(tools=("look",))
        conversations.append(await open(acting(call("look"), say("done"), tools=[look]), confirmation=policy))
        await conversations[0].send_message("go")
        request = await until(conversations[0], RequestOpened)
        await conversations[0].respond(request.request_id, "approve")
        assert (await conversations[0].run(timeout=PATIENCE)).status == "finished"
        assert seen[:2] == [[], "approved"]

    async def test_a_rejected_call_is_not_run_and_the_agent_hears_why(self, open: Open) -> None:
        policy = ConfirmationPolicy(tools=("terminal",))
        conversation = await open(
            acting(call("terminal", command="echo ran"), say("done")), confirmation=policy
        )
        await conversation.send_message("go")
        request = await until(conversation, RequestOpened)
        await conversation.respond(request.request_id, "reject", reason="not on a Sunday")
        assert (await conversation.run(timeout=PATIENCE)).final_text == "done"
        result = await last_result(conversation)
        assert result.is_error
        assert "not on a Sunday" in result.text
        assert "ran\n" not in result.text

    async def test_the_first_answer_to_a_request_counts(self, open: Open) -> None:
        policy = ConfirmationPolicy(mode="always")
        conversation = await open(acting(call("terminal", command="true"), say("done")), confirmation=policy)
        await conversation.send_message("go")
        request = await until(conversation, RequestOpened)
        await asyncio.gather(*(conversation.respond(request.request_id, "approve") for _ in range(3)))
        with pytest.raises(RequestNotFound, match="is approved already, and the first answer counts"):
            await conversation.respond(request.request_id, "reject")
        await conversation.run(timeout=PATIENCE)
        await conversation.respond(request.request_id, "approve", reason="the turn is over")
        with pytest.raises(RequestNotFound, match="is approved already, and the first answer counts"):
            await conversation.respond(request.request_id, "reject")
        assert [event.answer for event in await these(conversation, RequestResolved)] == ["approved"]

    async def test_an_interrupt_makes_open_requests_void(self, open: Open) -> None:
        policy = ConfirmationPolicy(mode="always")
        conversation = await open(acting(call("terminal", command="true"), say("done")), confirmation=policy)
        await conversation.send_message("go")
        request = await until(conversation, RequestOpened)
        await conversation.interrupt()
        assert [event.answer for event in await these(conversation, RequestResolved)] == ["void"]
        assert (await conversation.state()).pending == ()
        with pytest.raises(RequestNotFound, match="is void already"):
            await conversation.respond(request.request_id, "approve")

    async def test_the_policy_can_be_changed(self, open: Open) -> None:
        conversation = await open(acting(call("terminal", command="true"), say("done")))
        await conversation.set_confirmation_policy(ConfirmationPolicy(mode="always"))
        await conversation.send_message("go")
        request = await until(conversation, RequestOpened)
        assert (request.request, request.tool) == ("approval", "terminal")

    # --- secrets ---

    @pytest.mark.place
    async def test_secrets_reach_the_terminal_and_nobody_else(self, open: Open) -> None:
        secret = "hunter2-hunter2"
        script = (call("terminal", command='echo "$TOKEN"; echo ${#TOKEN}'), say("done"))
        conversation = await open(acting(*script), secrets={"TOKEN": secret})
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        assert (await last_result(conversation)).text.startswith("<secret-hidden>\n15\n")
        assert [event.names for event in await these(conversation, SecretsChanged)] == [("TOKEN",)]
        assert not any(secret.encode() in encode(event) for event in await past(conversation))

    async def test_a_secret_that_the_model_writes_is_used_and_not_kept(self, open: Open) -> None:
        secret, seen, pieces = 'hunter2-"hunter2"-hunter2', [], []

        @tool
        async def sign_in(password: str) -> str:
            """Use a password."""
            seen.append(password)
            return "in"

        command = f"printf %s '{secret}' | tee copy | base64; wc -c <copy"
        script = (
            call("terminal", command=command),
            call("sign_in", password=secret),
            say(f"It is {secret}!"),
        )
        conversation = await open(
            acting(*script, tools=["terminal", sign_in]),
            secrets={"TOKEN": secret},
            on_delta=lambda delta: pieces.append(delta.text + delta.thinking),
        )
        await conversation.send_message(f"use {secret}")
        outcome = await conversation.run(timeout=PATIENCE)
        assert outcome.final_text == "It is <secret-hidden>!"
        assert seen == [secret]
        results = [event.text for event in await these(conversation, ToolReturned)]
        assert results[0].startswith("<secret-hidden>\n25\n")
        logged = b"".join([encode(event) for event in await past(conversation)]).decode()
        assert "hunter2" not in logged
        assert "hunter2" not in "".join(pieces)

    async def test_a_secret_across_the_cut_of_an_output_is_not_shown_in_part(self, open: Open) -> None:
        secret = "abcdefghij" * 4
        command = "for i in $(seq 60); do echo $i; printf '%s' $TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN; "
        command += "printf '%s' $TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN$TOKEN; done"
        conversation = await open(
            acting(call("terminal", command=command), say("done")), secrets={"TOKEN": secret}
        )
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        text = (await last_result(conversation)).text
        assert "bytes left out" in text
        assert "abcd" not in text and "ghij" not in text

    async def test_more_secrets_than_can_be_hidden_are_refused(self, open: Open) -> None:
        conversation = await open(acting(say("done")))
        with pytest.raises(InvalidParams, match=r"secrets: at most 32768 characters .* \(got 500000\)"):
            await conversation.update_secrets({"TOKEN": "x" * 500_000})
        with pytest.raises(InvalidParams, match=r"secrets: at most 100 secrets \(got 120\)"):
            await conversation.update_secrets({f"N{nth}": "12345678" for nth in range(120)})

    async def test_secrets_can_be_changed_between_commands(self, open: Open) -> None:
        script = (call("terminal", command="echo ${#TOKEN}"), say("one"))
        again = (call("terminal", command="echo ${#TOKEN}"), say("two"))
        conversation = await open(acting(*script, *again))
        await conversation.update_secrets({"TOKEN": "12345678"})
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        await conversation.update_secrets({"TOKEN": "1234567890"})
        await conversation.send_message("go")
        await conversation.run(timeout=PATIENCE)
        texts = [event.text.splitlines()[0] for event in await these(conversation, ToolReturned)]
        assert texts == ["8", "10"]

    async def test_a_secret_needs_the_name_of_a_variable(self, open: Open) -> None:
        conversation = await open(acting(say("done")))
        with pytest.raises(InvalidParams, match="secrets"):
            await conversation.update_secrets({"NOT A NAME": "12345678"})
