"""Events: what is known is typed, what is not known is kept."""

import pytest
from msgspec import Raw

from agent_sdk.protocol import events
from agent_sdk.protocol.errors import InvalidRequest


def test_a_kind_of_a_newer_version_is_kept_whole():
    line = b'{"type":"moon_landed","seq":7,"at":1.5,"crew":["Neil"]}'
    event = events.decode(line)
    assert isinstance(event, events.Unknown)
    assert (event.kind, event.seq, event.at) == ("moon_landed", 7, 1.5)
    assert events.encode(event) == line
    assert events.kind_of(event) == "moon_landed"


def test_a_field_of_a_newer_version_is_ignored():
    event = events.decode(b'{"type":"turn_started","seq":1,"at":0,"run_id":"r","mood":"good"}')
    assert event == events.TurnStarted(seq=1, run_id="r")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"type":"turn_started","seq":1}',
        b'{"type":"turn_started","seq":"1","run_id":"r"}',
        b'{"type":"moon_landed"}',
        b'{"type":1,"seq":1}',
        b'{"type":"turn_started","seq":1,"run_id":"\xff"}',
        b'{"type":"moon_landed","seq":1,"a":' + b"[" * 100_000,
    ],
)
def test_what_is_no_event_is_refused(line):
    with pytest.raises(InvalidRequest):
        events.decode(line)


def test_what_a_provider_wants_to_see_again_comes_back():
    sent = events.AgentMessage(run_id="r", text="", provider=Raw(b'{"signature":"x"}'))
    event = events.decode(events.encode(sent))
    assert isinstance(event, events.AgentMessage)
    assert isinstance(event.provider, Raw)
    assert bytes(event.provider) == b'{"signature":"x"}'


def test_nothing_of_a_provider_stays_nothing():
    event = events.decode(events.encode(events.AgentMessage(run_id="r", text="")))
    assert isinstance(event, events.AgentMessage)
    assert event.provider is None


def test_every_kind_is_spelt_beside_its_class():
    assert events.kinds()["tool_called"] is events.ToolCalled
    assert events.kind_of(events.TurnStarted(run_id="r")) == "turn_started"
