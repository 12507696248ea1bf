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


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("\x1b[H\x1b[2Jone \x1b[K\r\ntwo" + " " * 190 + "\r\n\x1b[Hnew\x1b[K\r\n", "new\ntwo"),
        ("before\r\n\x1b[?1049h\x1b[50;1Hstatus\x1b[1;1Htop\x1b[2;3Hin", "top\n  in\n\nstatus"),
        ("before\r\n\x1b[?1049hedited\x1b[?1049lafter", "before\nafter"),
        ("a: 1%\nb: 1%\n\x1b[2Aa: 50%\n\x1b[1Bdone", "a: 50%\nb: 1%\ndone"),
        ("abc\x1b[2D\x1b[PX\x1b[3;1Hlast", "aX\n\nlast"),
        ("one\ntwo\nthree\x1b[2;1H\x1b[Mnew", "one\nnewee"),
        ("one\ntwo\x1b[1;1H\x1bMzero", "zero\none\ntwo"),
        ("\x1b[3;4r\x1b[3;1Ha\nb\nc\x1b[1;1Hfirst", "first\n\nb\nc"),
        ("\x1b[H" + "".join(f"{n}\n" for n in range(60)), "".join(f"{n}\n" for n in range(60)).rstrip()),
        ("\x1b[1;1H" + "x" * 5000, "x" * 5000),
        ("\x1b[99999999;99999999Hfar", " " * 1000 + "far"),
    ],
)
def test_of_a_program_that_moves_the_cursor_about_its_screen_is_seen(sent, seen):
    assert plain(sent) == seen


def test_what_came_long_before_a_screen_is_kept():
    assert plain("x" * 1_000_000 + "\x1b[Hy").startswith("x" * 500_000)


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


@given(st.text(alphabet=st.sampled_from("ab\n\r\b\t\x1b[]31mK;\x07\\\x9bPHAJLMr?h7")))
def test_nothing_that_a_terminal_obeys_is_left(sent):
    assert not set(plain(sent)) - set("ab \n\t[]31mK;\\PHAJLMr?h7")
