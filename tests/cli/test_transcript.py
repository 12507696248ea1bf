"""What people read of a conversation."""

import pytest
from msgspec import Raw

from agent_sdk.protocol import events
from agent_sdk.protocol.events import (
    AgentMessage,
    Delta,
    ErrorRaised,
    ModelFailed,
    ModelUsed,
    RequestOpened,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    Unknown,
    UserMessage,
)
from agent_server.cli.transcript import Transcript, call_line


def read(*items):
    transcript = Transcript()
    pieces = [
        piece
        for item in items
        for piece in (transcript.delta(item) if isinstance(item, Delta) else transcript.event(item))
    ]
    return "".join(piece.text for piece in pieces)


def said(text, **more):
    return AgentMessage(run_id="r", text=text, **more)


def piece(text):
    return Delta(run_id="r", after_seq=1, text=text)


def returned(text, **more):
    return ToolReturned(call_id="c", tool="terminal", text=text, **more)


def ended(status="finished", **more):
    return TurnEnded(run_id="r", status=status, **more)


def test_a_message_of_the_user_begins_with_you():
    assert read(UserMessage(text="Fix it\nplease")) == "you: Fix it\n  please\n"


def test_an_answer_that_was_streamed_is_not_said_twice():
    assert read(piece("I "), piece("see."), said("I see.")) == "agent: I see.\n"


def test_an_answer_whose_stream_had_holes_is_said_whole():
    assert read(piece("I "), said("I see.")) == "agent: I \nagent: I see.\n"


def test_a_stream_that_broke_off_does_not_share_its_line():
    assert read(piece("I th"), events.Interrupted(reason="enough")) == "agent: I th\n[interrupted: enough]\n"


def test_the_last_answer_is_not_repeated_at_the_end_of_the_turn():
    assert read(said("Done."), ended(final_text="Done.", iterations=1)) == (
        "agent: Done.\n[finished - 1 step, 0 tokens in, 0 out]\n"
    )


def test_a_final_text_that_nobody_said_yet_is_shown():
    assert read(ended(final_text="Done.", iterations=2)).startswith("agent: Done.\n[finished - 2 steps")


def test_the_end_of_a_turn_tells_what_it_consumed():
    used = ModelUsed(run_id="r", model="m", input_tokens=100, output_tokens=7, cost=0.002)
    assert read(used, used, ended(iterations=2)) == "[finished - 2 steps, 200 tokens in, 14 out, $0.0040]\n"


def test_a_failed_turn_tells_why():
    assert read(ended("failed", reason="no such model")).startswith("[failed: no such model - ")


def test_a_command_looks_as_it_is_typed():
    assert call_line("terminal", '{"command": "ls -l\\n"}') == "$ ls -l"


def test_who_approves_sees_where_the_next_command_begins():
    assert call_line("terminal", '{"command": "ls\\nrm -r ."}') == "$ ls\\nrm -r ."


def test_another_call_shows_its_arguments():
    assert call_line("price", '{"symbol": "X", "count": 2}') == "price symbol=X count=2"


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', "\ud800", "[" * 100_000])
def test_arguments_that_are_no_object_are_shown_as_they_are(arguments):
    assert call_line("price", arguments).startswith("price ")


def test_output_is_cut_in_the_middle():
    shown = read(returned("\n".join(str(number) for number in range(100))))
    assert shown.splitlines() == [
        *(f"    {number}" for number in range(6)),
        "    [… 88 lines …]",
        *(f"    {number}" for number in range(94, 100)),
    ]


def test_output_cannot_drive_the_terminal():
    assert "\x1b" not in read(
        UserMessage(text="\x1b[2J"),
        piece("\x1b[2J"),
        said("\x1b[2J"),
        ToolCalled(run_id="r", call_id="c", tool="\x1b[2J", arguments="\x1b[2J"),
        returned("\x1b]0;title\x07\x9b31m"),
        ErrorRaised(error="\x1b[2J", message="\x1b[2J", classification="tool"),
        ended("failed", reason="\x1b[2J", final_text="\x1b[2J"),
        Unknown(kind="\x1b[2J", raw=Raw(b"{}")),
    )


def test_text_that_reads_backwards_is_made_visible():
    assert read(returned("a\u202eb")) == "    a\\u202eb\n"


def test_a_retry_says_when_it_comes():
    failed = ModelFailed(run_id="r", error="model_rate_limited", message="slow down", attempt=1, retry_in=2.0)
    assert read(failed) == "[model_rate_limited: slow down; trying again in 2.0 s]\n"


def test_a_call_that_waits_for_approval_is_shown():
    opened = RequestOpened(
        request_id="q1", call_id="c", request="approval", tool="terminal", arguments='{"command": "rm x"}'
    )
    assert read(opened) == "[waits for approval of q1: $ rm x]\n"


@pytest.mark.parametrize("kind", sorted(events.kinds()))
def test_every_kind_of_event_can_be_shown(kind):
    fields = {
        "run_id": "r",
        "call_id": "c",
        "tool": "t",
        "text": "x",
        "arguments": "{}",
        "model": "m",
        "tools": ["t"],
        "conversation": "id",
        "error": "e",
        "message": "m",
        "attempt": 1,
        "request_id": "q",
        "request": "approval",
        "what": "key",
        "answer": "void",
        "status": "finished",
        "classification": "tool",
        "names": ["A"],
        "state": "ready",
        "generation": 2,
        "reason": "r",
        "after_seq": 1,
    }
    wanted = events.kinds()[kind].__struct_fields__
    event = events.kinds()[kind](**{name: value for name, value in fields.items() if name in wanted})
    shown = read(event)
    assert shown == "" or shown.endswith("\n")
