"""What a turn makes of finish reason and content of an answer: the table of agent.ending, in both dialects."""

import json
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from agent_sdk import Agent, Conversation, Outcome
from agent_sdk.protocol.events import AgentMessage, Event, ModelFailed, ToolCalled, ToolReturned, TurnEnded
from agent_sdk.protocol.specs import LLM
from agent_sdk.tools import tool
from tests.agent.llm.provider import JSON, KEY

Said = tuple[str, str, str, str | None]
"""Finish reason in OpenAI's words, text, thinking, and the arguments of a call of `note`."""

ANTHROPIC = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "refused": "refusal"}
ANTHROPIC["context_length_exceeded"] = "model_context_window_exceeded"
FULL = "context_length_exceeded"

CUT = ("length", "The fix is to ", "", None)
DONE = ("stop", "rename it.", "", None)
EMPTY = ("stop", "", "", None)
THOUGHTS = ("stop", "", "hm", None)
SPENT = ("length", " ", "hm", None)
CALL = ("tool_calls", "", "", '{"text": "a"}')
CUT_CALL = ("length", "", "", '{"text": "a')
CUT_BEFORE_ARGUMENTS = ("length", "", "", "")
WHOLE_CALL_AT_THE_LIMIT = ("length", "", "", '{"text": "a"}')

ran: list[str] = []


@tool
async def note(text: str = "nothing") -> str:
    """Write it down."""
    ran.append(text)
    return "noted"


def stream(dialect: str, said: Said) -> bytes:
    reason, text, thinking, arguments = said
    if dialect == "openai":
        function = {"name": "note", "arguments": arguments}
        calls = [] if arguments is None else [{"index": 0, "id": "c", "function": function}]
        delta = {"content": text, "reasoning_content": thinking, "tool_calls": calls}
        parts = [{"choices": [{"delta": delta}]}, {"choices": [{"delta": {}, "finish_reason": reason}]}]
    else:
        blocks = [
            ({"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": thinking}),
            ({"type": "text", "text": ""}, {"type": "text_delta", "text": text}),
        ]
        if arguments is not None:
            use = {"type": "tool_use", "id": "c", "name": "note", "input": {}}
            blocks.append((use, {"type": "input_json_delta", "partial_json": arguments}))
        parts = [{"type": "message_start", "message": {}}]
        for index, (block, delta) in enumerate(blocks):
            parts.append({"type": "content_block_start", "index": index, "content_block": block})
            if any(value for name, value in delta.items() if name != "type"):
                parts.append({"type": "content_block_delta", "index": index, "delta": delta})
        stop = {"stop_reason": ANTHROPIC.get(reason, reason)}
        parts += [{"type": "message_delta", "delta": stop}, {"type": "message_stop"}]
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts).encode()


class Talk:
    """One turn, and what came of it."""

    def __init__(self) -> None:
        self.outcome = Outcome(status="failed")
        self.events: list[Event] = []
        self.requests: list[dict[str, object]] = []

    def all(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
async def turn(dialect: str, tmp_path) -> AsyncIterator[Callable[..., object]]:
    """Let a provider give these answers, the last one for ever, and run a turn with them."""
    talk = Talk()
    answers: list[bytes] = []
    ran.clear()

    async def respond(request: web.Request) -> web.Response:
        talk.requests.append(await request.json())
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return web.Response(body=answer, headers=JSON)

    app = web.Application()
    app.router.add_post("/v1/{tail:.*}", respond)

    async with TestServer(app) as server:
        llm = LLM(model=f"{dialect}/m", api_key=KEY, base_url=str(server.make_url("/v1")), retries=0)
        agent = Agent(llm=llm, tools=[note])
        async with Conversation(agent, tmp_path, callbacks=[talk.events.append]) as conversation:

            async def run(*said: Said) -> Talk:
                answers[:] = [stream(dialect, one) for one in said]
                if not talk.requests:
                    await conversation.send_message("go")
                talk.outcome = await conversation.run()
                return talk

            yield run


@pytest.mark.parametrize(
    ("answers", "status", "final_text", "finish_reason", "asked"),
    [
        ([DONE], "finished", "rename it.", "stop", 1),
        ([CUT, DONE], "finished", "The fix is to rename it.", "stop", 2),
        ([CUT, CUT, DONE], "finished", "The fix is to The fix is to rename it.", "stop", 3),
        ([("LENGTH", *CUT[1:]), DONE], "finished", "The fix is to rename it.", "stop", 2),
        ([("timeout", "half an", "", None)], "failed", "", "timeout", 1),
        ([CUT], "limit", "The fix is to " * 4, "length", 4),
        ([(FULL, "The fix is", "", None)], "limit", "The fix is", "context_window", 1),
        ([CUT, (FULL, "rename", "", None)], "limit", "The fix is to rename", "context_window", 2),
        ([(FULL, "", "hm", None)], "limit", "", "context_window", 1),
        ([(FULL, "", "", '{"text": "a'), DONE], "finished", "rename it.", "stop", 2),
        ([EMPTY, DONE], "finished", "rename it.", "stop", 2),
        ([EMPTY], "failed", "", "stop", 2),
        ([THOUGHTS, DONE], "finished", "rename it.", "stop", 2),
        ([THOUGHTS], "failed", "", "stop", 2),
        ([SPENT, DONE], "finished", "rename it.", "stop", 2),
        ([SPENT], "failed", "", "length", 2),
        ([("refused", "I won't.", "", None)], "failed", "", "refused", 1),
        ([("content_filter", "", "", None)], "failed", "", "filtered", 1),
        ([("SAFETY", "half an", "", None)], "failed", "", "filtered", 1),
        ([("error", "half an", "", None)], "failed", "", "error", 1),
        ([("something_new", "All fine.", "", None)], "finished", "All fine.", "something_new", 1),
        ([CALL, DONE], "finished", "rename it.", "stop", 2),
        ([WHOLE_CALL_AT_THE_LIMIT, DONE], "finished", "rename it.", "stop", 2),
        ([CUT_CALL, DONE], "finished", "rename it.", "stop", 2),
        ([CUT_BEFORE_ARGUMENTS, DONE], "finished", "rename it.", "stop", 2),
        ([CUT_CALL], "limit", "", "length", 4),
        ([("refused", "No.", "", '{"text": "a"}')], "failed", "", "refused", 1),
    ],
)
async def test_what_a_turn_makes_of_an_answer(
    turn, dialect, answers, status, final_text, finish_reason, asked
):
    talk = await turn(*answers)
    outcome = talk.outcome
    assert (outcome.status, outcome.final_text, outcome.finish_reason) == (status, final_text, finish_reason)
    assert len(talk.requests) == asked
    assert talk.all(TurnEnded)[-1].finish_reason == finish_reason
    written = talk.all(ModelFailed) or talk.all(AgentMessage)[-1:]
    assert finish_reason in (getattr(written[0], "finish_reason", "") or written[0].message)


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (("refused", "I won't do that.", "", None), "model_refused", "I won't do that."),
        (("content_filter", "", "", None), "model_refused", "filter"),
        (EMPTY, "model_answer_broken", "without text"),
        (SPENT, "model_answer_broken", "max_output_tokens"),
        (("error", "half an", "", None), "model_answer_broken", "finish reason 'error'"),
    ],
)
async def test_a_failure_has_its_kind_and_its_reason(turn, answer, error, reason):
    talk = await turn(answer)
    assert talk.outcome.error == error
    assert reason in talk.outcome.reason


async def test_a_full_context_window_ends_the_turn_and_says_what_helps(turn):
    outcome = (await turn((FULL, "half", "", None))).outcome
    assert "new conversation" in outcome.reason
    assert "larger context window" in outcome.reason
    again = (await turn(DONE)).outcome
    assert (again.status, again.final_text) == ("finished", "halfrename it.")


@pytest.mark.parametrize("answer", [CUT_CALL, CUT_BEFORE_ARGUMENTS])
async def test_a_call_that_the_limit_cut_is_not_run_and_the_model_is_told(turn, answer):
    talk = await turn(answer, CALL, DONE)
    assert [(call.cut, call.arguments) for call in talk.all(ToolCalled)] == [
        (True, answer[3]),
        (False, CALL[3]),
    ]
    cut, noted = talk.all(ToolReturned)
    assert ("output limit" in cut.text, cut.is_error) == (True, True)
    assert (noted.text, ran) == ("noted", ["a"])


@pytest.mark.parametrize("arguments", ["", " ", "null", " null\n", "{}"])
async def test_a_call_may_say_in_any_way_that_it_has_no_arguments(turn, arguments):
    talk = await turn(("tool_calls", "", "", arguments), DONE)
    assert (talk.outcome.status, ran) == ("finished", ["nothing"])
    assert "malformed" not in json.dumps(talk.requests[-1]["messages"])


async def test_the_model_is_told_why_it_is_asked_again_and_is_not_shown_empty_answers(turn, dialect):
    talk = await turn(EMPTY, CUT, DONE)
    messages = talk.requests[-1]["messages"]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    assert (
        roles
        == {"openai": ["user", "user", "assistant", "user"], "anthropic": ["user", "assistant", "user"]}[
            dialect
        ]
    )
    assert "no text" in json.dumps(messages)
    assert "output limit" in json.dumps(messages[-1])


@pytest.mark.parametrize(
    ("answer", "status"), [(CUT, "limit"), (EMPTY, "failed"), (("refused", "No.", "", None), "failed")]
)
async def test_a_turn_that_ended_without_an_answer_asks_again_when_it_is_run_again(turn, answer, status):
    assert (await turn(answer)).outcome.status == status
    assert (await turn(DONE)).outcome.status == "finished"


async def test_an_error_at_the_end_of_an_answer_is_in_the_log(turn):
    talk = await turn(("error", "half an", "", None))
    (failed,) = talk.all(ModelFailed)
    assert "half an" in failed.message
