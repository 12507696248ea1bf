"""What files held before they were edited."""

from agent_sdk.agent.tools.file_editor import KEPT_BYTES, KEPT_PER_FILE, Undo


def test_states_come_back_last_first():
    undo = Undo()
    undo.remember("a", None)
    undo.remember("a", b"1")
    assert [undo.take("a"), undo.take("a"), undo.take("a")] == [(b"1",), (None,), None]


def test_ten_states_of_a_file_are_kept():
    undo = Undo()
    for number in range(KEPT_PER_FILE + 5):
        undo.remember("a", str(number).encode())
    taken = [undo.take("a") for _ in range(KEPT_PER_FILE)]
    assert taken[-1] == (b"5",)
    assert undo.take("a") is None


def test_the_file_edited_longest_ago_is_forgotten_when_it_is_too_much():
    undo = Undo()
    undo.remember("old", b"x" * (KEPT_BYTES // 2))
    undo.remember("new", b"x" * (KEPT_BYTES // 2))
    undo.remember("new", b"x")
    assert undo.take("old") is None
    assert undo.take("new") == (b"x",)
