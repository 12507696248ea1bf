"""Secrets do not get into results."""

from agent_sdk.agent.mask import Mask


def test_a_secret_is_hidden_wherever_it_stands():
    mask = Mask(["hunter2-hunter2"])
    assert mask.text("a hunter2-hunter2, ahunter2-hunter2a") == "a <secret-hidden>, a<secret-hidden>a"


def test_of_two_secrets_the_longer_one_is_hidden_as_a_whole():
    mask = Mask(["password", "password-and-more"])
    assert mask.text("password-and-more password") == "<secret-hidden> <secret-hidden>"


def test_each_line_of_a_key_is_hidden():
    mask = Mask(["-----BEGIN KEY-----\nabcdefghijkl\nmnop\n"])
    assert mask.text("abcdefghijkl\nmnop") == "<secret-hidden>\nmnop"


def test_short_values_and_regular_expressions_are_harmless():
    mask = Mask(["true", "a.c+(d)*[e"])
    assert mask.text("true abc a.c+(d)*[e") == "true abc <secret-hidden>"


def test_data_is_searched_to_its_depth():
    mask = Mask(["hunter2-hunter2"])
    data = {"a": ["x hunter2-hunter2", {"hunter2-hunter2": 1}], "n": 3, "t": ("hunter2-hunter2",)}
    assert mask.data(data) == {
        "a": ["x <secret-hidden>", {"<secret-hidden>": 1}],
        "n": 3,
        "t": ["<secret-hidden>"],
    }


def test_without_secrets_nothing_changes():
    assert Mask().text("anything") == "anything"
