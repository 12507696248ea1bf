"""What a terminal's output looks like to a reader."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.agent.tools.screen import plain


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07prompt", "prompt"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bP1$r0m\x1b\\text", "text"),
        ("\x1b(Bplain\x1b=", "plain"),
        ("\x9b31mred", "red"),
        ("cut off \x1b[3", "cut off "),
        ("cut off \x1b", "cut off "),
        ("\x1b[?2004hon", "on"),
    ],
)
def test_escape_sequences_are_not_seen(sent, seen):
    assert plain(sent) == seen


def test_lines_end_with_newlines():
    assert plain("a\r\nb\r\n") == "a\nb\n"


def test_of_a_progress_bar_the_last_state_is_seen():
    assert plain("start\n 10%\r 50%\r100%\r\ndone\r") == "start\n100%\ndone"


def test_backspaces_take_back_what_was_typed():
    assert plain("teh\b\bhe\nX\bX\b\b\b") == "the\n"


def test_control_characters_are_left_out_and_tabs_stay():
    assert plain("a\x00b\x07\tc\x7f\x85d\n") == "ab\tcd\n"


def test_a_flood_of_unfinished_sequences_takes_linear_time():
    assert plain("\x1b]" * 500_000) == ""


@given(st.text(alphabet=st.sampled_from("ab\n\r\b\x1b[]31mK;\x07\\\x9bP")))
def test_nothing_that_a_terminal_obeys_is_left(sent):
    assert not set(plain(sent)) - set("ab\n[]31mK;\\P")
