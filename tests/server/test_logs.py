import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.agent.mask import Mask
from agent_server.logs import ABOUT, Redactor, opened, shown

SECRET = "sk-0123456789abcdef"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(write, *, style="json", stream=None, **kwargs) -> list[str]:
    stream = stream or io.StringIO()
    with opened(style=style, stream=stream, **kwargs) as logs:
        write(logs)
    return stream.getvalue().split("\n")[:-1]


def test_a_line_is_a_json_object_with_time_level_and_event():
    (line,) = lines(lambda logs: logs.log.info("server_started", port=8000))
    entry = json.loads(line)
    assert list(entry) == ["time", "level", "event", "port"]
    assert (entry["level"], entry["event"], entry["port"]) == ("info", "server_started", 8000)


def test_what_is_bound_for_a_conversation_is_on_its_lines():
    def write(logs):
        before = ABOUT.set({"conversation": "c1"})
        logs.log.info("session_opened")
        ABOUT.reset(before)

    assert json.loads(lines(write)[0])["conversation"] == "c1"


def test_lines_below_the_level_are_not_written():
    assert lines(lambda logs: logs.log.info("x"), level="warning") == []


@given(st.text(), st.binary(), st.floats())
def test_whatever_comes_there_is_one_object_per_line(text, data, number):
    def write(logs):
        logs.log.info("request_refused", text=text, data=data, number=number, nested={text: [data, object()]})

    (line,) = lines(write)
    assert json.loads(line)["event"] == "request_refused"
    assert line.isascii()
    assert line.isprintable()


def test_known_secrets_are_masked_wherever_they_are():
    def write(logs):
        logs.redactor.add([SECRET, None, "short"])
        logs.log.info("x", a=f"Bearer {SECRET}", b={SECRET: [SECRET, SECRET.encode()]}, c="short")
        try:
            raise ValueError(SECRET)
        except ValueError as bug:
            logs.bug(bug, "i1")

    written = lines(write)
    assert len(written) == 2
    assert SECRET not in "".join(written)
    assert json.loads(written[0])["c"] == "short"
    assert "ValueError: [secret]" in json.loads(written[1])["traceback"]


def test_a_secret_is_masked_as_long_as_somebody_needs_it():
    redactor = Redactor()
    forget_one = redactor.add([SECRET])
    forget_two = redactor.add([SECRET])
    forget_one()
    assert redactor.clean(SECRET) == "[secret]"
    forget_two()
    assert redactor.clean(SECRET) == SECRET


def test_the_longer_of_two_secrets_is_masked_whole():
    redactor = Redactor()
    redactor.add([SECRET, SECRET + "tail"])
    assert redactor.clean(f"<{SECRET}tail>") == "<[secret]>"


def test_a_terminal_gets_readable_lines():
    (line,) = lines(lambda logs: logs.log.warning("box_lost", box="b1"), style="auto", stream=Terminal())
    assert line[8:] == " warning box_lost box=b1"


def test_a_readable_line_cannot_be_forged():
    def write(logs):
        logs.log.info("x", value="a\n00:00:00 error forged\x1b[2K\u202e\x9b")

    (line,) = lines(write, style="console")
    assert "\x1b" not in line
    assert "\u202e" not in line


def test_control_and_hiding_characters_are_shown():
    assert shown("a\x1b[31m\u200b\u2028ü") == "a\\x1b[31m\\u200b\\u2028ü"


def test_a_bug_of_ours_that_a_library_met_is_logged_whole():
    def write(logs):
        try:
            raise ZeroDivisionError("ours")
        except ZeroDivisionError:
            logging.getLogger("aiohttp.server").exception("Unhandled")

    entry = json.loads(lines(write)[0])
    assert entry["event"] == "library_spoke"
    assert "ZeroDivisionError: ours" in entry["traceback"]


def test_malformed_requests_share_one_line_a_second():
    from aiohttp.http_exceptions import BadStatusLine  # noqa: PLC0415

    moments = iter([0.0, 0.1, 0.2, 5.0])

    def write(logs):
        for _ in range(4):
            logging.getLogger("aiohttp.server").error("bad", exc_info=BadStatusLine("secret stuff"))

    entries = [json.loads(line) for line in lines(write, clock=lambda: next(moments))]
    assert [(e["event"], e["problem"], e["unreported"]) for e in entries] == [
        ("request_refused", "BadStatusLine", 0),
        ("request_refused", "BadStatusLine", 2),
    ]


def test_afterwards_nothing_is_caught_any_more():
    before = list(logging.getLogger().handlers)
    lines(lambda logs: None)
    assert logging.getLogger().handlers == before


def test_a_reader_that_is_gone_stops_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with opened(style="json", stream=Gone()) as logs:
        logs.log.info("x")
        logs.log.info("y")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_every_level_of_the_configuration_works(level):
    assert len(lines(lambda logs: getattr(logs.log, level)("x"), level=level)) == 1


def test_a_secret_of_a_client_hides_nothing_that_is_the_operators():
    def write(logs):
        logs.redactor.of("c1", Mask(["message_refused", "conversation", "error", "2026", SECRET]))
        logs.log.error("message_refused", conversation="c1", problem=f"message_refused: {SECRET}")
        logs.log.error("message_refused", conversation="c2", problem="message_refused")
        logs.log.error("message_refused", problem=SECRET)

    own, others, nobodys = map(json.loads, lines(write))
    assert (own["event"], own["level"], own["conversation"]) == ("message_refused", "error", "c1")
    assert own["problem"] == "[secret]: [secret]"
    assert others["problem"] == "message_refused"
    assert nobodys["problem"] == "[secret]"


def test_a_conversation_that_is_gone_masks_nothing_more():
    redactor = Redactor()
    forget = redactor.of("c1", Mask([SECRET]))
    assert redactor.clean(SECRET, "c1") == "[secret]"
    forget()
    assert redactor.clean(SECRET, "c1") == SECRET
