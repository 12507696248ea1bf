"""Keeping secrets out of what the model reads, the log keeps, clients are streamed and operators see.

A value is found as it is, in the lines it has, and as programs usually write it: escaped for JSON or for a URL, in
base64 (wherever it begins in there) and in hex. Searching takes time in proportion to the text, however many values
there are (see Needles): a value is cut into pieces of bounded length, and what may be hidden is bounded.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import quote, quote_plus

from msgspec.structs import replace

from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.events import AgentMessage, Event, ToolCalled
from agent_sdk.protocol.specs import LLM, Model

HIDDEN = "<secret-hidden>"
SHORTEST = 8
"""Characters; a shorter value would blank out ordinary words."""
MOST_SECRETS = 100
MOST_CHARS = 32 << 10
MOST_LINES = 500
_PIECE = 256
_CHUNK = 4096
"""Characters of a text that are looked through at once."""
_BASE64_LINE = 76
_HEX_LINE = 60
_CUT = 4
"""At a cut, so many characters of a value are enough to be taken for a part of it."""
ELLIPSIS = "…"
"""Stands where a text was cut at its end: what may be the beginning of a value before it is not shown."""
_SECRET_HEADER = re.compile("auth|key|token|secret|cookie|password", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OUTSIDE = (
    *("text", "thinking", "arguments", "final_text", "reason", "message", "instructions"),
    *("title", "tags", "data"),
)
"""Fields of events that others have written. The rest is ours: kinds, ids, names of tools that there are."""


def check_secrets(secrets: Mapping[str, str]) -> None:
    """Check that these can be variables of commands, and be kept out of a log without holding everybody else up.

    Raises:
        InvalidParams: a name cannot be an environment variable, a value has a NUL in it, or they are too many or too
            long.
    """
    for name, value in secrets.items():
        if not _VARIABLE.fullmatch(name):
            raise InvalidParams(f"secrets: {name[:64]!r} cannot name an environment variable")
        if "\0" in value:
            raise InvalidParams(f"secrets: the value of {name} has a NUL character in it")
    lines = sum(len(value.splitlines()) for value in secrets.values())
    chars = sum(map(len, secrets.values()))
    for what, got, most in (
        ("secrets", len(secrets), MOST_SECRETS),
        ("characters in all their values", chars, MOST_CHARS),
        ("lines in all their values", lines, MOST_LINES),
    ):
        if got > most:
            raise InvalidParams(
                f"secrets: at most {most} {what} (got {got}); write long ones to a file of the workspace"
            )


class Needles:
    """Texts of at least SHORTEST characters to look for, all at once.

    A chunk of a text is first compared as a row of 32-bit words, at the speed of C: wherever a needle stands, one of
    the words lies within its first seven bytes. Only a chunk with such a word is searched, place by place, and at a
    place that may be one the longest needle is found by bisection among all of them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Take the needles; each is wanted once."""
        self.texts = sorted(set(texts))
        self.longest = max(map(len, self.texts), default=0)
        """Characters of the longest one."""
        self._shorter = _prefixes(self.texts)
        self._starts = {needle[:SHORTEST] for needle in self.texts}
        starts = [start.encode("utf-8", "surrogatepass") for start in self._starts]
        self._words = {word for start in starts for at in range(4) for word in _words(start[at : at + 4])}

    def __bool__(self) -> bool:
        return bool(self.texts)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where needles stand, each as (start, end); what lies wholly within another may be left out."""
        starts, skipped = self._starts, 0
        last: dict[int, int] = {}
        for chunk in range(0, len(text), _CHUNK):
            piece = text[chunk : chunk + _CHUNK + SHORTEST - 1]
            if self._words.isdisjoint(_words(piece.encode("utf-8", "surrogatepass"))):
                continue
            for start in range(max(chunk, skipped), chunk + len(piece) - SHORTEST + 1):
                if text[start : start + SHORTEST] not in starts or start < skipped:
                    continue
                if (found := self._at(text, start)) < 0:
                    continue
                end = start + len(needle := self.texts[found])
                before, last[found] = last.get(found), start
                if before is not None and start < before + len(needle):
                    end = _last_of_run(text, needle, start, start - before) + len(needle)
                    skipped = end - self.longest
                yield start, end

    def _at(self, text: str, start: int) -> int:
        """Return which is the longest needle that stands here, or -1."""
        # What lies in order between a needle and a text that begins with it begins with that needle, too.
        at = bisect_right(self.texts, text[start : start + self.longest]) - 1
        while at >= 0 and not text.startswith(self.texts[at], start):
            at = self._shorter[at]
        return at

    def begun(self, text: str, least: int = 1) -> int:
        """Return how many characters at the end of a text, `least` or more, are a needle's beginning but not all."""
        return _longest_start(self.texts, text[-self.longest :], least)

    def ended(self, text: str, least: int = 1) -> int:
        """Return how many characters at the beginning of a text, `least` or more, are a needle's end but not all."""
        return _longest_start(self._backwards, text[: self.longest][::-1], least)

    def hold(self, text: str, least: int) -> bool:
        """Whether the text, of `least` characters or more, stands somewhere in a needle."""
        return least <= len(text) < self.longest and any(text in needle for needle in self.texts)

    @cached_property
    def _backwards(self) -> list[str]:
        return sorted(needle[::-1] for needle in self.texts)


def _words(data: bytes) -> memoryview:
    """Return the bytes, but for up to three at the end, as numbers of 32 bits."""
    return memoryview(data)[: len(data) // 4 * 4].cast("I")


def _prefixes(needles: Sequence[str]) -> list[int]:
    """Return, for each of the sorted needles, which is the longest other one that it begins with; -1: none."""
    found: list[int] = []
    for at, needle in enumerate(needles):
        shorter = at - 1
        while shorter >= 0 and not needle.startswith(needles[shorter]):
            shorter = found[shorter]
        found.append(shorter)
    return found


def _longest_start(needles: Sequence[str], text: str, least: int) -> int:
    """Return how many characters at the end of a text are the beginning, but not all, of one of the sorted needles."""
    for start in range(len(text) - least + 1 if needles else 0):
        end = text[start:]
        at = bisect_right(needles, end)
        if at < len(needles) and needles[at].startswith(end):
            return len(end)
    return 0


class Mask:
    """Replaces values by `<secret-hidden>`. More can be added; the oldest are forgotten when they are too many."""

    def __init__(self, values: Iterable[str] = (), *, bounded: bool = True) -> None:
        self._bounded = bounded
        self._values: dict[str, frozenset[str]] = {}
        """What to look for, by value; the newest last."""
        self.needles = Needles(())
        self.hide(values)

    def __repr__(self) -> str:
        return f"<Mask of {len(self._values)} values>"

    def hide(self, values: Iterable[str | None]) -> None:
        """Replace these, too. Those of less than 8 characters are let be."""
        fresh = [value[:MOST_CHARS] for value in values if value and len(value) >= SHORTEST]
        if not fresh or all(value in self._values for value in fresh):
            return
        for value in fresh:
            known = self._values.pop(value, None)
            self._values[value] = known or frozenset(n for n in _needles(value) if len(n) >= SHORTEST)
        while self._bounded and (
            len(self._values) > 2 * MOST_SECRETS or sum(map(len, self._values)) > 2 * MOST_CHARS
        ):
            del self._values[next(iter(self._values))]
        self.needles = Needles(frozenset().union(*self._values.values()))

    def text(self, text: str, sign: str = HIDDEN) -> str:
        """Return the text with `sign` in the place of the values, also of one that is cut at the last ELLIPSIS."""
        if not self.needles.longest:
            return text
        spans, at = [*self.needles.spans(text)], text.rfind(ELLIPSIS)
        if at >= 0 and (begun := self.needles.begun(text[:at], _CUT)):
            spans.append((at - begun, at))
        return _without(text, spans, sign)

    def part(self, text: str, *, begun: bool = False, cut: bool = False) -> str:
        """Return what is a part of a longer text without the values, and without what is left of those at its ends.

        Args:
            begun: something came before it, where a value may have begun.
            cut: more would have come, the rest of a value perhaps.
        """
        return _without(text, self.spans(text, begun=begun, cut=cut), HIDDEN)

    def spans(self, text: str, *, begun: bool = False, cut: bool = False) -> list[tuple[int, int]]:
        """Return what `part` hides, each stretch as (start, end)."""
        # What is left of a value may itself be the end of one that is there as a whole: both are hidden.
        spans = [*self.needles.spans(text)]
        if begun and (ended := self.needles.ended(text, _CUT)):
            spans.append((0, ended))
        if cut and (left := self.needles.begun(text, _CUT)):
            spans.append((len(text) - left, len(text)))
        if begun and cut and self.needles.hold(text, _CUT):
            spans.append((0, len(text)))
        return spans

    def data(self, value: Any) -> Any:
        """Return JSON-able data without the values, however deep they are."""
        if not self.needles:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.data(key): self.data(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item) for item in value]
        return value

    def event(self, event: Event, *, begun: bool = False) -> Event:
        """Return the event without the values. The text of an answer that goes on with one that was cut is `begun`."""
        if not self.needles:
            return event
        changed: dict[str, Any] = {}
        answer, cut = isinstance(event, AgentMessage), is_cut(event)
        for name in _OUTSIDE:
            value = getattr(event, name, None)
            if not value:
                continue
            as_streamed = answer or cut
            hidden = (
                self.part(value, begun=begun and name == "text", cut=cut) if as_streamed else self.data(value)
            )
            if hidden != value:
                changed[name] = hidden
        provider = getattr(event, "provider", None)
        if provider is not None and (
            (cut and "thinking" in changed) or any(self.needles.spans(bytes(provider).decode()))
        ):
            changed["provider"] = (
                None  # it is signed as a whole; without it the provider sees the answer's text
            )
        return replace(event, **changed) if changed else event


def shortened(text: str, limit: int) -> str:
    """Return the text, or its first `limit - 1` characters and an ELLIPSIS."""
    return text if len(text) <= limit else text[: limit - 1] + ELLIPSIS


def is_cut(event: Event) -> bool:
    """Whether what the model wrote, and the event holds, came to no end of its own."""
    if isinstance(event, AgentMessage):
        return event.finish_reason not in ("", "stop", "tool_calls")
    return isinstance(event, ToolCalled) and event.cut


class MaskedStream:
    """Masks text that comes in pieces: what may be the beginning of a value is held until more is known."""

    def __init__(self, mask: Mask, *, begun: bool = False) -> None:
        """Begin with the first piece; when the text is `begun`, a value may have begun in what came before it."""
        self._mask = mask
        self._begun = begun
        self._held = ""
        self._known: int | None = None
        """How much of what is held belongs to a value that was shown as hidden; None: there is none right before."""

    def feed(self, text: str) -> str:
        """Return what can be shown by now."""
        needles, text = self._mask.needles, self._held + text
        if self._begun and len(text) < needles.longest:
            self._held = text
            return ""
        return self._shown(text, len(text) - needles.begun(text))

    def flush(self, *, cut: bool) -> str:
        """Return what is held: no more comes, although more would have come if it was `cut`."""
        return self._shown(self._held, len(self._held), cut=cut)

    def _shown(self, text: str, until: int, *, cut: bool = False) -> str:
        if not text:
            return ""
        spans = self._mask.spans(text, begun=self._begun, cut=cut)
        self._begun = False
        if self._known is not None:
            spans.append((0, self._known))
        parts, done, known = [], 0, None
        for start, end in _joined(spans):
            if start >= until and start > 0:
                break  # what it is a part of may begin before it
            parts += [text[done:start], "" if start == 0 and self._known is not None else HIDDEN]
            done, known = end, end - until if end >= until else None
        parts.append(text[done:until])
        self._held, self._known = text[until:], known
        return "".join(parts)


def _last_of_run(text: str, needle: str, at: int, period: int) -> int:
    """Return where a needle that is found here, and overlaps itself again and again, begins for the last time."""
    times = len(needle) // period
    while times:
        if text.startswith(needle, at + times * period):
            at += times * period
        else:
            times //= 2
    return at


def _without(text: str, spans: Iterable[tuple[int, int]], sign: str) -> str:
    """Return the text with `sign` in the place of these stretches."""
    parts, done = [], 0
    for start, end in _joined(spans):
        parts += [text[done:start], sign]
        done = end
    return "".join((*parts, text[done:])) if parts else text


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the stretches that these cover, in order; those that touch are one."""
    start, end = -1, -1
    for first, last in sorted(spans):
        if first > end:
            if start >= 0:
                yield start, end
            start = first
        end = max(end, last)
    if start >= 0:
        yield start, end


def _needles(value: str) -> Iterator[str]:
    """Yield what to look for."""
    for line in value.splitlines():
        yield from _pieces(line, _PIECE)
    escaped = quote(value, safe="", errors="replace")
    lower = re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), escaped)
    words = (quote_plus(value, errors="replace"), quote(value, errors="replace"), escaped, lower)
    as_json = (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    for form in (value, *as_json, *words):
        yield from _pieces(form, _PIECE)
    plain = value.encode("utf-8", "replace")
    for shift in range(3):
        encoded = b64encode(bytes(shift) + plain).decode()
        # What depends on neighbours is left out, unless it ends there. Programs that begin with it break its lines.
        first, last = -(-8 * shift // 6), 8 * (shift + len(plain)) // 6
        for form in (encoded[first:last], encoded[first:]):
            yield from _pieces(form, _PIECE if shift else _BASE64_LINE)
            yield from _pieces(form.replace("+", "-").replace("/", "_"), _PIECE)
    yield from _pieces(plain.hex(), _HEX_LINE)
    yield from _pieces(plain.hex().upper(), _PIECE)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Yield the text in pieces, and its end once more, so that it is not too short to be noticed."""
    for at in range(0, len(text), size):
        yield text[at : at + size]
    yield text[-size:]


def hidden_in(llm: Model | None) -> list[str]:
    """Return what nobody may read of how a model is reached: its key, and headers that look like one."""
    if not isinstance(llm, LLM):
        return []
    headers = [value.split(" ")[-1] for name, value in llm.headers.items() if _SECRET_HEADER.search(name)]
    return [*([llm.api_key] if llm.api_key else []), *headers]
