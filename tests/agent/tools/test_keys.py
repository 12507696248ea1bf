"""Names of keys."""

import pytest

from agent_sdk.agent.tools.terminal import keystroke


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("C-c", b"\x03"),
        ("C-d", b"\x04"),
        ("C-z", b"\x1a"),
        ("C-C", b"\x03"),
        ("UP", b"\x1b[A"),
        ("ENTER", b"\r"),
        ("TAB", b"\t"),
        ("Escape", b"\x1b"),
    ],
)
def test_a_key_is_sent_as_terminals_send_it(text, sent):
    assert keystroke(text) == sent


@pytest.mark.parametrize("text", ["yes", "up", "C-cc", "C-", "print('UP')", "Ünï", "END\n", "C-c\n", ""])
def test_anything_else_is_text(text):
    assert keystroke(text) is None
