"""The checker itself: a clean history passes, and each rule finds what breaks it."""

from __future__ import annotations

import msgspec
import pytest

from tests.chaos.checker import Broken, check, judge
from tests.chaos.history import Begins, Called, Entry, Final, History, Left, Ran, Reached, Saw, digest, load

ID = "conversation"


def log(*events: dict) -> dict[str, Final]:
    numbered = [{**event, "seq": seq} for seq, event in enumerate(events, 1)]
    return {ID: Final("e1", [Entry(event["seq"], msgspec.json.encode(event)) for event in numbered])}


def message(op_id: str) -> dict:
    return {"type": "user_message", "op_id": op_id}


def called(op_id: str, seq: int = 0, begun: float = 0.0, ended: float = 1.0, **more) -> Called:
    given = {"kind": "send_message", "outcome": "ok", "client": "writer", "digest": "", **more}
    return Called(conversation=ID, op_id=op_id, seq=seq, begun=begun, ended=ended, **given)


def saw(*seqs: int, logs: dict[str, Final], client: str = "subscriber", epoch: str = "e1") -> list[Saw]:
    bodies = {entry.seq: entry.body for entry in logs[ID].events}
    return [
        Saw(
            client=client,
            conversation=ID,
            epoch=epoch,
            seq=seq,
            digest=digest(msgspec.json.decode(bodies.get(seq, b"0"))),
        )
        for seq in seqs
    ]


TWO = log(message("a"), message("b"))
CLEAN = [
    called("a", 1),
    called("b", 2, 2, 3),
    *saw(1, 2, logs=TWO),
    Reached(client="subscriber", conversation=ID, seq=2),
]


def rules(records, logs) -> set[int]:
    return {violation.rule for violation in check(records, logs)}


def test_a_clean_history_has_no_violations():
    assert check(CLEAN, TWO) == []


def test_an_acknowledged_message_that_is_not_in_the_log_was_lost():
    (violation,) = check([called("a", 1), called("b", 2)], log(message("a")))
    assert (violation.rule, violation.text[:5]) == (1, "lost:")


def test_an_acknowledged_message_is_where_its_answer_said():
    assert rules([called("a", 2)], log(message("a"))) == {1}


def test_a_message_without_an_answer_may_be_there_or_not():
    open_end = called("b", outcome="none")
    assert check([called("a", 1), open_end], TWO) == []
    assert check([called("a", 1), open_end], log(message("a"))) == []


@pytest.mark.parametrize(("outcome", "rule"), [("ok", 1), ("none", 2), ("error", 2)])
def test_no_message_is_there_twice(outcome, rule):
    assert rules([called("a", 1, outcome=outcome)], log(message("a"), message("a"))) == {rule}


def test_a_message_that_nobody_sent_was_invented():
    assert rules([called("a", 1)], TWO) == {2}


@pytest.mark.parametrize("seqs", [(1, 1, 2), (2,), (1, 3), (2, 1), (1, 2, 1, 2)])
def test_a_subscriber_sees_each_event_once_and_in_order(seqs):
    logs = log(message("a"), message("b"), message("c"))
    calls = [called("a", 1), called("b", 2), called("c", 3)]
    assert rules([*calls, *saw(*seqs, logs=logs)], logs) == {3}


def test_a_subscriber_begins_where_it_said():
    begins = Begins(client="subscriber", conversation=ID, after=1)
    assert check([*CLEAN[:2], begins, *saw(2, logs=TWO)], TWO) == []


def test_a_subscriber_sees_only_what_is_in_the_log():
    assert rules([*CLEAN, *saw(3, logs=TWO)], TWO) == {3}
    other = log(message("a"), {**message("b"), "at": 1})
    assert rules(CLEAN, other) == {3}


def test_a_subscriber_sees_all_there_was_to_see():
    reached = Reached(client="subscriber", conversation=ID, seq=2)
    assert rules([*CLEAN[:2], *saw(1, logs=TWO), reached], TWO) == {3}


def test_another_epoch_comes_only_after_a_reset():
    changed = saw(3, logs=TWO, epoch="e2")
    assert rules([*CLEAN, *changed], TWO) == {3}
    anew = [Begins(client="subscriber", conversation=ID, after=0), *saw(1, logs=TWO, epoch="e2")]
    assert check([*CLEAN, *anew], TWO) == []


def test_two_subscribers_never_disagree():
    others = log(message("a"), message("c"))
    records = [*saw(1, 2, logs=TWO, epoch="e0"), *saw(1, 2, logs=others, client="other", epoch="e0")]
    assert rules([*CLEAN[:2], *records], TWO) == {4}


def test_what_had_returned_comes_before_what_began_later():
    swapped = [called("a", 2, 0, 1), called("b", 1, 2, 3)]
    assert rules(swapped, log(message("b"), message("a"))) == {5}


def test_calls_at_the_same_time_may_come_in_any_order():
    both = [called("a", 2, 0, 3), called("b", 1, 1, 2)]
    assert check(both, log(message("b"), message("a"))) == []


@pytest.mark.parametrize(
    "events",
    [
        ({"type": "turn_started", "run_id": "r"}, {"type": "turn_started", "run_id": "r"}),
        ({"type": "turn_ended", "run_id": "r"},),
        (
            {"type": "tool_called", "call_id": "c"},
            {"type": "tool_returned", "call_id": "c"},
            {"type": "tool_returned", "call_id": "c"},
        ),
        ({"type": "request_resolved", "request_id": "q"},),
    ],
)
def test_nothing_starts_twice_or_ends_without_a_start(events):
    assert rules([], log(*events)) == {6}


@pytest.mark.parametrize("what", [(), ("start", "start"), ("start", "end", "end")])
def test_an_answered_command_ran_once(what):
    ran = [Ran(op_id="x", what=word) for word in what]
    assert rules([called("x", kind="execute"), *ran], {}) == {6}
    assert check([called("x", kind="execute"), Ran(op_id="x", what="start")], {}) == []


def test_a_log_without_gaps_is_whole():
    entries = log(message("a"), message("b"), message("c"))[ID].events
    calls = [called("a", 1), called("c", 3)]
    assert rules(calls, {ID: Final("e1", [entries[0], entries[2]])}) == {7}


def test_an_event_says_the_seq_it_has():
    assert rules(
        [called("a", 1)], {ID: Final("e1", [Entry(1, msgspec.json.encode({**message("a"), "seq": 9}))])}
    ) == {7}


def test_nothing_is_left_without_an_owner():
    assert rules([Left(what="process 1 sleep")], {}) == {8}


def test_the_verdict_shows_what_was_broken():
    with pytest.raises(Broken, match=r"1 violations\nrule 8: process 1"):
        judge([Left(what="process 1")], {})


def test_a_history_can_be_judged_again(tmp_path):
    history = History(tmp_path)
    for record in CLEAN:
        history.add(record)
    history.close()
    assert list(load(tmp_path)) == CLEAN
