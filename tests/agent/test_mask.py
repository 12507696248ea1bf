"""Secrets do not get into results."""

import base64
import json
import random
import re
from urllib.parse import quote, quote_plus

import pytest
from msgspec import Raw

from agent_sdk.agent.mask import HIDDEN, MOST_CHARS, Mask, MaskedStream, check_secrets
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.events import AgentMessage, ToolCalled, TurnEnded

VALUE = 'p@ss/w"rd with\nlines+\u00e9'
LONG = base64.b85encode(random.Random(1).randbytes(800)).decode()


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


@pytest.mark.parametrize("before", ["", "a", "ab"])
def test_a_secret_is_hidden_in_the_usual_encodings(before):
    mask = Mask([VALUE])
    raw = (before + VALUE).encode()
    for text in (
        json.dumps({"key": before + VALUE}),
        json.dumps({"key": before + VALUE}, ensure_ascii=False),
        quote(before + VALUE),
        quote(before + VALUE, safe=""),
        quote_plus(before + VALUE),
        raw.hex(),
        raw.hex().upper(),
        base64.b64encode(raw + b"after").decode(),
        base64.urlsafe_b64encode(raw).decode(),
    ):
        masked = mask.text(f"<{text}>")
        assert HIDDEN in masked
        assert len(masked) < len(before) * 2 + len(HIDDEN) + 22, text


def test_a_long_secret_is_hidden_whole_and_in_the_lines_that_base64_makes_of_it():
    mask = Mask([LONG])
    assert mask.text(f"a {LONG} b") == f"a {HIDDEN} b"
    assert set(mask.text(base64.encodebytes(LONG.encode()).decode()).split("\n")[:-2]) == {HIDDEN}


def test_what_repeats_itself_leaves_nothing():
    assert Mask(["abcabcab"]).text("abcabcabcabcab.") == f"{HIDDEN}."


class Counting(str):
    """Text that counts how often it is looked at; a search looks at all that comes after where it begins."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)

    def find(self, part, start=0):
        self.looks += len(self) - start
        return super().find(part, start)

    def startswith(self, *arguments):
        self.looks += 1
        return super().startswith(*arguments)


@pytest.mark.parametrize("again", ["a", "abc"])
@pytest.mark.parametrize("between", ["", "X"])
def test_a_flood_of_what_repeats_itself_is_searched_in_proportion_to_its_length(again, between):
    """A secret that is one letter, and a command that prints nothing else, took minutes for a mebibyte."""
    mask = Mask([again * (MOST_CHARS // len(again))])
    text = Counting((again * (600 // len(again)) + again[:1] + between) * 200)
    assert HIDDEN in mask.text(text)
    assert text.looks < 4 * len(text)


@pytest.mark.parametrize("flood", ["The quick brown fox. ", "sk-proj-", "0123456789abcdef", "{value}"])
def test_how_often_a_text_is_looked_at_does_not_depend_on_how_many_secrets_there_are(flood):
    """With 100 secrets a result of 4 MiB held the server up for 8 s."""
    chance = random.Random(3)
    values = [f"sk-proj-{chance.randbytes(150).hex()}" for _ in range(100)]
    once = flood.format(value=values[0])
    text = Counting(once * (100_000 // len(once)))
    Mask(values).text(text)
    assert text.looks < 1.5 * len(text)


def test_what_is_hidden_is_what_a_search_for_each_value_by_itself_finds():
    chance = random.Random(4)
    for _ in range(300):
        letters = chance.choice(("ab", "abc", "abcdefghijklmnop"))
        values = [
            "".join(chance.choices(letters, k=chance.randint(8, 12))) for _ in range(chance.randint(1, 9))
        ]
        text = "".join(chance.choices([*letters * 3, *values], k=40))
        hidden = bytearray(len(text))
        for needle in {needle for value in values for needle in Mask([value]).needles.texts}:
            for at in range(len(text)):
                if text.startswith(needle, at):
                    hidden[at : at + len(needle)] = b"x" * len(needle)
        expected = re.sub(
            "\0+", HIDDEN, "".join("\0" if hide else c for hide, c in zip(hidden, text, strict=True))
        )
        assert Mask(values).text(text) == expected


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_pieces_of_a_stream_are_shown_as_the_whole_would_be(begun, cut):
    mask, chance = Mask(["hunter2-hunter2", LONG]), random.Random(2)
    words = ["hunter2-hunter2", "hunter2", "hun", "-", " ", "abc", LONG, LONG[:300], LONG[-300:]]
    for _ in range(300):
        text = "".join(chance.choices(words, k=6))
        stream, shown, left = MaskedStream(mask, begun=begun), "", text
        while left:
            size = chance.choice((1, 2, 3, 7, 50, 400))
            shown, left = shown + stream.feed(left[:size]), left[size:]
        assert shown + stream.flush(cut=cut) == mask.part(text, begun=begun, cut=cut)


def test_a_stream_holds_back_only_what_may_be_a_secret():
    stream = MaskedStream(Mask(["hunter2-hunter2"]))
    assert [stream.feed(piece) for piece in ("I hun", "t for ", "hunter2-")] == ["I ", "hunt for ", ""]
    assert stream.flush(cut=False) == "hunter2-"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("is hunter2-", f"is {HIDDEN}"),
        ("is hunter2-hunter2hunter2-h", f"is {HIDDEN}"),
        ("is hunt", f"is {HIDDEN}"),
        ("is hun", "is hun"),  # so few may be anything
    ],
)
def test_of_a_secret_in_which_a_text_was_cut_nothing_is_shown(text, shown):
    mask = Mask(["hunter2-hunter2"])
    stream = MaskedStream(mask)
    assert stream.feed(text) + stream.flush(cut=True) == shown
    assert mask.text(f"the answer cannot be read: {text}… (and so on)").startswith(
        f"the answer cannot be read: {shown}… ("
    )
    for reason in ("length", "context_window", "filtered", "refused", "interrupted", "timeout"):
        answer = AgentMessage(
            run_id="r", text=text, thinking=text, finish_reason=reason, provider=Raw(b'["hunter2-"]')
        )
        masked = mask.event(answer)
        assert (masked.text, masked.thinking) == (shown, shown)
        assert masked.provider == (None if masked.thinking != text else answer.provider)
    whole = AgentMessage(run_id="r", text="is hunter2-", finish_reason="stop")
    assert mask.event(whole) == whole
    call = ToolCalled(run_id="r", call_id="c", tool="t", arguments=text, cut=True)
    assert mask.event(call).arguments == shown


def test_of_a_secret_in_which_an_answer_was_cut_and_continued_nothing_is_shown():
    mask = Mask(["hunter2-hunter2"])
    answer = AgentMessage(run_id="r", text="hunter2 ok", finish_reason="stop")
    assert mask.event(answer, begun=True).text == f"{HIDDEN} ok"
    assert mask.event(answer).text == "hunter2 ok"


def ends(mask, head, tail):
    """The two ends of a text whose middle is left out."""
    return mask.part(head, cut=True), mask.part(tail, begun=True)


def test_a_secret_that_is_cut_in_two_is_not_shown_in_part():
    mask = Mask(["hunter2-hunter2"])
    assert ends(mask, "head hunter2-h", "nter2 tail") == (f"head {HIDDEN}", f"{HIDDEN} tail")
    assert ends(mask, "head", "tail") == ("head", "tail")


@pytest.mark.parametrize("length", [20, 255, 300, 700])
def test_of_a_secret_that_is_cut_in_three_the_middle_is_not_shown_either(length):
    value = random.Random(length).randbytes(length).hex()[:length]
    mask = Mask([value])
    for start in range(0, length - 12, 7):
        for size in (4, 8, 12):
            shown = mask.part(value[start : start + size], begun=True, cut=True)
            assert len(shown.replace(HIDDEN, "")) < 5, start  # so few may be anything
    assert mask.part(value[4:12]) == value[4:12]  # nothing was cut: it may be anything
    assert mask.part("ordinary", begun=True, cut=True) == "ordinary"


@pytest.mark.parametrize("length", [20, 255, 300, 400, 700])
def test_wherever_a_long_secret_is_cut_in_two_none_of_it_is_shown(length):
    value = random.Random(length).randbytes(length).hex()[:length]
    mask = Mask([value])
    for cut in range(8, length - 8):
        head, tail = ends(mask, "head " + value[:cut], value[cut:] + " tail")
        shown = head.replace(HIDDEN, "").removeprefix("head "), tail.replace(HIDDEN, "").removesuffix(" tail")
        assert max(map(len, shown)) < 4, cut  # so few may be anything


def test_a_secret_whose_end_looks_like_its_beginning_is_hidden_whole_at_a_cut():
    mask = Mask(["prod-secret-prod"])
    assert ends(mask, "x prod-secret-prod", "y") == (f"x {HIDDEN}", "y")


def test_of_a_secret_with_another_one_in_it_a_stream_shows_nothing():
    outer, inner = "postgres://admin:hunter2hunter2@db.internal/prod", "hunter2hunter2"
    mask = Mask([outer, inner])
    for size in range(1, len(outer)):
        stream = MaskedStream(mask)
        text = f"at {outer}!"
        shown = "".join(stream.feed(text[at : at + size]) for at in range(0, len(text), size)) + stream.flush(
            cut=False
        )
        assert shown == f"at {HIDDEN}!", size


def test_in_events_only_what_others_wrote_is_masked():
    mask = Mask(["hunter2-hunter2"])
    called = ToolCalled(run_id="hunter2-hunter2", call_id="c", tool="t", arguments='{"a": "hunter2-hunter2"}')
    masked = mask.event(called)
    assert (masked.run_id, masked.arguments) == ("hunter2-hunter2", f'{{"a": "{HIDDEN}"}}')
    ended = TurnEnded(run_id="r", status="failed", final_text="hunter2-hunter2", reason="hunter2-hunter2")
    assert (mask.event(ended).final_text, mask.event(ended).reason) == (HIDDEN, HIDDEN)
    signed = AgentMessage(run_id="r", text="", provider=Raw(b'[{"thinking": "hunter2-hunter2"}]'))
    assert mask.event(signed).provider is None


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ({f"N{nth}": "x" for nth in range(101)}, r"secrets: at most 100 secrets \(got 101\)"),
        ({"N": "x" * (MOST_CHARS + 1)}, r"at most 32768 characters in all their values \(got 32769\)"),
        ({"N": "x\n" * 501}, r"at most 500 lines in all their values \(got 501\)"),
    ],
)
def test_more_than_can_be_hidden_is_refused(secrets, words):
    with pytest.raises(InvalidParams, match=words):
        check_secrets(secrets)


def test_former_values_are_hidden_until_there_are_too_many():
    mask = Mask(["the-first-value"])
    mask.hide(["the-second-value"])
    assert mask.text("the-first-value the-second-value") == f"{HIDDEN} {HIDDEN}"
    mask.hide(f"{nth:08}" for nth in range(200))
    assert mask.text("the-first-value") == "the-first-value"
