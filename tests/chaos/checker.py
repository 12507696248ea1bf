"""Judges a run: nine rules over what clients recorded and what the log has in the end.

1. Every acknowledged operation is in the log exactly once, where its answer said.
2. An operation without an answer is there once or not at all.
3. What a subscriber saw is a contiguous range of the log, each event once, in order, up to where it had to get.
4. Two subscribers never saw different events under the same seq.
5. If one call had returned before another began, their events are in that order.
6. Nothing starts twice or ends twice: commands, tool calls, turns, requests.
7. The log itself is whole: numbered from 1 without gaps.
8. Nothing of ours is left without an owner.
9. Nobody is told of an unknown outcome of what never began; and what has a known one did begin.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from tests.chaos.history import Begins, Called, Left, Logs, Ran, Reached, Record, Saw, digest

SHOWN = 20


class Violation(NamedTuple):
    """A rule that was broken, and by what."""

    rule: int
    text: str


class Broken(AssertionError):
    """A run broke rules."""

    def __init__(self, violations: list[Violation]) -> None:
        lines = [f"rule {rule}: {text}" for rule, text in violations[:SHOWN]]
        more = len(violations) - len(lines)
        super().__init__(
            "\n".join([f"{len(violations)} violations", *lines, *([f"… {more} more"] if more > 0 else [])])
        )
        self.violations = violations


def check(records: Iterable[Record], logs: Logs) -> list[Violation]:
    """Every violation of the rules, in the order of the rules."""
    records = list(records)
    calls = [record for record in records if isinstance(record, Called)]
    events = {id: [_Event.of(entry.seq, entry.body) for entry in final.events] for id, final in logs.items()}
    return sorted(
        [
            *_operations(calls, events),
            *_ranges(records, logs, events),
            *_agreement(records),
            *_real_time(calls, events),
            *_starts_and_ends(records, calls, events),
            *_whole(logs),
            *(Violation(8, record.what) for record in records if isinstance(record, Left)),
            *_known_outcomes(records, calls, events),
        ]
    )


def broken_rules(violations: Iterable[Violation]) -> set[int]:
    """Which rules were broken."""
    return {violation.rule for violation in violations}


def judge(records: Iterable[Record], logs: Logs) -> None:
    """Raise Broken when a rule was broken."""
    if violations := check(records, logs):
        raise Broken(violations)


class _Event(NamedTuple):
    seq: int
    fields: dict[str, Any]

    @classmethod
    def of(cls, seq: int, body: bytes) -> _Event:
        return cls(seq, msgspec.json.decode(body))

    @property
    def type(self) -> str:
        return str(self.fields.get("type"))


Events = dict[str, list[_Event]]


def _places(events: Events) -> dict[str, list[tuple[str, int]]]:
    """Where in the logs each op_id of a message is."""
    places = defaultdict(list)
    for conversation, found in events.items():
        for event in found:
            if event.type == "user_message" and event.fields.get("op_id"):
                places[event.fields["op_id"]].append((conversation, event.seq))
    return places


def _operations(calls: list[Called], events: Events) -> Iterator[Violation]:
    """Rules 1 and 2, of messages: they carry their op_id into the log."""
    places = _places(events)
    deleted = {
        call.conversation for call in calls if call.kind == "conversation.delete" and call.outcome == "ok"
    }
    known = set()
    for call in calls:
        if call.kind != "send_message" or call.conversation in deleted:
            continue
        known.add(call.op_id)
        found = places.get(call.op_id, [])
        if call.outcome == "ok" and found != [(call.conversation, call.seq)]:
            what = "lost" if not found else "twice" if len(found) > 1 else "elsewhere"
            yield Violation(
                1, f"{what}: acknowledged message {call.op_id} at {call.seq}, log has it at {found}"
            )
        elif len(found) > 1:
            yield Violation(2, f"twice: message {call.op_id}, answered {call.outcome}, is at {found}")
    for op_id in places.keys() - known:
        yield Violation(2, f"invented: message {op_id} at {places[op_id]} was sent by nobody")


def _ranges(records: list[Record], logs: Logs, events: Events) -> Iterator[Violation]:
    """Rule 3."""
    last: dict[tuple[str, str], tuple[str | None, int]] = {}
    highest: Counter[tuple[str, str]] = Counter()
    bodies = {id: {event.seq: digest(event.fields) for event in found} for id, found in events.items()}
    for record in records:
        if isinstance(record, Begins):
            last[record.client, record.conversation] = None, record.after
        elif isinstance(record, Saw):
            key = record.client, record.conversation
            epoch, before = last.get(key, (None, 0))
            if epoch not in (None, record.epoch):
                yield Violation(
                    3, f"{record.client}: the epoch of {record.conversation} changed without a reset"
                )
            elif record.seq != before + 1:
                what = "gap" if record.seq > before else "repeated"
                yield Violation(3, f"{what}: {record.client} saw {record.seq} after {before}")
            last[key] = record.epoch, record.seq
            highest[key] = max(highest[key], record.seq)
            if record.conversation in logs and logs[record.conversation].epoch == record.epoch:
                there = bodies[record.conversation].get(record.seq)
                if there != record.digest:
                    what = "is not in the log" if there is None else "is another in the log"
                    yield Violation(3, f"{record.client}: event {record.seq} {what}")
    for record in records:
        if isinstance(record, Reached):
            seen = highest[record.client, record.conversation]
            if seen < record.seq:
                yield Violation(3, f"lost: {record.client} saw {seen} events of {record.seq}")


def _agreement(records: list[Record]) -> Iterator[Violation]:
    """Rule 4."""
    first: dict[tuple[str, str, int], Saw] = {}
    for record in records:
        if isinstance(record, Saw):
            other = first.setdefault((record.conversation, record.epoch, record.seq), record)
            if other.digest != record.digest:
                yield Violation(4, f"{record.client} and {other.client} saw different events {record.seq}")


def _real_time(calls: list[Called], events: Events) -> Iterator[Violation]:
    """Rule 5: no call that began after another had returned comes before it."""
    by_conversation = defaultdict(list)
    for call in calls:
        if call.outcome == "ok" and call.seq:
            by_conversation[call.conversation].append(call)
    for done in by_conversation.values():
        returns = sorted(done, key=lambda call: call.ended)
        highest, nth = None, 0
        for call in sorted(done, key=lambda call: call.begun):
            while nth < len(returns) and returns[nth].ended < call.begun:
                if highest is None or returns[nth].seq > highest.seq:
                    highest = returns[nth]
                nth += 1
            if highest is not None and call.seq < highest.seq:
                yield Violation(
                    5, f"{call.op_id} ({call.seq}) began after {highest.op_id} ({highest.seq}) returned"
                )


_ONCE = {
    "turn_started": "run_id",
    "turn_ended": "run_id",
    "tool_called": "call_id",
    "tool_returned": "call_id",
    "request_opened": "request_id",
    "request_resolved": "request_id",
}


def _starts_and_ends(records: list[Record], calls: list[Called], events: Events) -> Iterator[Violation]:
    """Rule 6."""
    for conversation, found in events.items():
        counted = Counter((e.type, e.fields[_ONCE[e.type]]) for e in found if e.type in _ONCE)
        for (kind, id), count in counted.items():
            if count > 1:
                yield Violation(6, f"{count} times {kind} {id} in {conversation}")
        for end, start in (
            ("turn_ended", "turn_started"),
            ("tool_returned", "tool_called"),
            ("request_resolved", "request_opened"),
        ):
            for kind, id in counted:
                if kind == end and (start, id) not in counted:
                    yield Violation(6, f"{end} {id} without {start} in {conversation}")
    ran = Counter((record.op_id, record.what) for record in records if isinstance(record, Ran))
    for (op_id, what), count in ran.items():
        if count > 1:
            yield Violation(6, f"ran twice: {count} times {what} of command {op_id}")
    for call in calls:
        if call.kind == "execute" and call.outcome == "ok" and ran[call.op_id, "start"] != 1:
            yield Violation(
                6, f"answered, but started {ran[call.op_id, 'start']} times: command {call.op_id}"
            )


_TRACE = re.compile(r"echo (\S+) start >>")
"""What a command that leaves traces begins with, see conftest.Case.effect."""


def _known_outcomes(records: list[Record], calls: list[Called], events: Events) -> Iterator[Violation]:
    """Rule 9."""
    ran = {record.op_id for record in records if isinstance(record, Ran)}
    for call in calls:
        if call.status == "unknown" and call.kind == "execute" and call.op_id not in ran:
            yield Violation(9, f"unknown, but never began: command {call.op_id}")
    for found in events.values():
        traces = {
            event.fields["call_id"]: trace[1]
            for event in found
            if event.type == "tool_called" and (trace := _TRACE.search(event.fields.get("arguments", "")))
        }
        for event in found:
            trace = traces.get(event.fields.get("call_id", "")) if event.type == "tool_returned" else None
            if trace is None:
                continue
            data = event.fields.get("data", {})
            unknown = "unknown" in (data.get("outcome"), data.get("status"))
            if unknown and trace not in ran:
                yield Violation(9, f"unknown, but never began: tool call {event.fields['call_id']}")
            elif not event.fields.get("is_error") and not unknown and trace not in ran:
                yield Violation(9, f"has a result, but never began: tool call {event.fields['call_id']}")


def _whole(logs: Logs) -> Iterator[Violation]:
    """Rule 7."""
    for conversation, final in logs.items():
        for place, entry in enumerate(final.events, 1):
            if entry.seq != place:
                yield Violation(7, f"event {place} of {conversation} is numbered {entry.seq}")
                break
            if msgspec.json.decode(entry.body).get("seq") != entry.seq:
                yield Violation(7, f"event {entry.seq} of {conversation} says another seq")
