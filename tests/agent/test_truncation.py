"""Long text, cut in its middle."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.agent.history import cut_middle
from agent_sdk.agent.middleware.tool_output import truncated, truncated_result


def test_a_short_text_stays_as_it_is():
    assert cut_middle("short", 5) == "short"
    assert truncated("kürz", 5) == ("kürz", 0)


def test_a_long_text_keeps_head_and_tail_and_says_what_is_missing():
    assert cut_middle("a" * 9 + "üb" + "b" * 9, 4) == "aa\n[... 17 bytes left out ...]\nbb"
    assert cut_middle("a" * 10 + "b" * 10, 4, 1000) == "aa\n[... 1016 bytes left out ...]\nbb"


def test_half_of_a_surrogate_pair_becomes_a_question_mark():
    assert truncated("a\ud800b", 10) == ("a?b", 0)


@given(st.text(min_size=1), st.integers(min_value=2, max_value=50))
def test_bytes_kept_and_bytes_cut_add_up(text, limit):
    kept, cut = truncated(text, limit)
    size = len(text.encode(errors="replace"))
    assert len(kept.encode()) + cut == size
    assert len(kept.encode()) <= max(limit, size if cut == 0 else 0)
    assert cut == 0 or size > limit


def test_a_result_of_20_mib_stays_whole():
    assert truncated_result("x" * (20 << 20)) == ("x" * (20 << 20), 0)


def test_a_result_that_json_makes_much_longer_still_fits_into_a_message():
    text, cut = truncated_result("\0" * (30 << 20))
    assert len(text) + cut == 30 << 20
    assert len(msgspec.json.encode(text)) <= 56 << 20
