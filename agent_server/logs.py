"""The server's log lines: JSON or readable, one line per event, without secrets, never in the way of the loop.

Events are past-tense verbs (`conversation_opened`); what they are about (`conversation`, `connection`) is in
ABOUT. Nothing is configured globally: a server has its own logger, so that two of them in one process do not
mix. Lines are written by a thread: a terminal that is held (^S) or a full pipe must not stop the server; when
10 000 lines wait, further ones are counted and dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import FilteringBoundLogger

from agent_sdk.agent.mask import Mask
from agent_sdk.protocol.errors import shown

LINES_WAITING = 10_000
MASK = "[secret]"
OURS = frozenset(
    {"time", "level", "event", "conversation", "connection", "method", "box", "incident", "runtime", "logger"}
)
"""What no secret of a client may hide from the operator: when, what, and about which."""
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

ABOUT: ContextVar[Mapping[str, Any]] = ContextVar("ABOUT")
"""What the log lines of this task tell beside their own facts."""

Event = MutableMapping[str, Any]
Log = FilteringBoundLogger


class Redactor:
    """Masks secrets by their value in what others have written; what is ours stays as it is.

    Those of a conversation are masked in the lines about it, and in lines of which nobody knows whose they are.
    """

    def __init__(self) -> None:
        self._own: list[Mask] = []
        self._masks: dict[str, Mask] = {}

    def add(self, values: Iterable[str | None]) -> Callable[[], None]:
        """Mask these values in all lines from now on; returns what makes them ordinary again.

        Values of less than 8 characters are let be.
        """
        mask = Mask(bounded=False)
        mask.hide(values)
        self._own.append(mask)
        return lambda: self._own.remove(mask)

    def of(self, conversation: str, mask: Mask) -> Callable[[], None]:
        """Mask the lines about a conversation with this; returns what ends that."""
        self._masks[conversation] = mask

        def forget() -> None:
            self._masks.pop(conversation, None)

        return forget

    def clean(self, text: str, conversation: str | None = None) -> str:
        """Return the text with secrets masked; with those of all conversations, unless one is given."""
        named = (
            self._masks.values() if conversation is None else filter(None, [self._masks.get(conversation)])
        )
        for mask in (*self._own, *named):
            text = mask.text(text, MASK)
        return text

    def __call__(self, logger: Any, method: str, event: Event) -> Event:
        """Be a structlog processor."""
        about = event.get("conversation")
        clean = partial(self.clean, conversation=None if about is None else str(about))
        return {key: _plain(value, str if key in OURS else clean) for key, value in event.items()}


def _plain(value: Any, clean: Callable[[str], str]) -> Any:
    """Return what JSON can say, without secrets."""
    match value:
        case str():
            return clean(value)
        case float():
            return value if math.isfinite(value) else str(value)
        case bool() | int() | None:
            return value
        case Mapping():
            return {clean(str(key)): _plain(item, clean) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, clean) for item in value]
        case bytes():
            return clean(value.decode("utf-8", "backslashreplace"))
        case _:
            return clean(str(value))


class Lines:
    """A thread that writes lines to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._queue: queue.Queue[str | None] = queue.Queue(LINES_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """Write what waits, for at most a second or two, and end the thread."""
        try:
            self._queue.put(None, timeout=1.0)
        except queue.Full:
            return
        self._thread.join(timeout=1.0)

    def msg(self, line: str) -> None:
        """Have one line written; never waits."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    debug = info = warning = error = critical = exception = msg

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            if self._dropped:
                line += f'\n{{"level": "warning", "event": "log_lines_dropped", "count": {self._dropped}}}'
                self._dropped = 0
            try:
                self._stream.write(f"{line}\n")
                if self._queue.empty():
                    self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads any more; the server goes on without a log.
                return


class Logs:
    """A logger and what belongs to it."""

    def __init__(self, log: Log, redactor: Redactor, lines: Lines, clock: Callable[[], float]) -> None:
        self.log = log
        self.redactor = redactor
        self._lines = lines
        self._clock = clock
        self._next = 0.0
        self._held = 0

    def refused(self, problem: str) -> None:
        """Log that somebody was refused who has not shown a key: one line a second, with how many were left out."""
        now = self._clock()
        if now < self._next:
            self._held += 1
            return
        self.log.warning("request_refused", problem=problem, unreported=self._held)
        self._next, self._held = now + 1.0, 0

    def end(self) -> None:
        """Write what waits (1 s at most), then nothing more: for a process that ends without leaving `opened`."""
        self._lines.end()

    def bug(self, bug: BaseException, incident: str, **facts: str) -> None:
        """Log a bug under the incident id that the other side was told."""
        story = "".join(traceback.format_exception(bug))
        self.log.error("bug_met", incident=incident, **facts, traceback=story)


@contextmanager
def opened(
    *,
    style: Literal["auto", "json", "console"] = "auto",
    level: str = "info",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Logs]:
    """Open the server's log, and catch what libraries log meanwhile.

    Args:
        style: the option `log_format`.
        level: the least level that is written.
        stream: where to; None: standard error.
        clock: monotonic seconds, for the rate limit of refused requests.
    """
    stream = stream or sys.stderr
    console = style == "console" or (style == "auto" and stream.isatty())
    redactor = Redactor()
    with Lines(stream) as lines:
        log: Log = structlog.wrap_logger(
            lines,
            processors=[
                _add_about,
                structlog.processors.add_log_level,
                _stamp,
                redactor,
                _as_text if console else _as_json,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
            context_class=dict,
        )
        logs = Logs(log, redactor, lines, clock)
        handler, root = _Records(logs), logging.getLogger()
        root.addHandler(handler)
        try:
            yield logs
        finally:
            root.removeHandler(handler)


def _add_about(logger: Any, method: str, event: Event) -> Event:
    return {**ABOUT.get({}), **event}


def _stamp(logger: Any, method: str, event: Event) -> Event:
    event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return event


def _as_json(logger: Any, method: str, event: Event) -> str:
    """Return one line of ASCII: nothing that came from outside can break it or reorder it."""
    ordered = {"time": event.pop("time"), "level": event.pop("level"), "event": event.pop("event"), **event}
    return json.dumps(ordered, ensure_ascii=True, allow_nan=False)


def _as_text(logger: Any, method: str, event: Event) -> str:
    moment, level, name = event.pop("time"), event.pop("level"), event.pop("event")
    story = event.pop("traceback", "")
    facts = " ".join(f"{key}={shown(str(value))}" for key, value in event.items())
    line = f"{moment[11:19]} {level:<7} {shown(str(name))} {facts}".rstrip()
    return line + "".join(f"\n    {shown(part)}" for part in story.splitlines())


class _Records(logging.Handler):
    """Passes the standard library's log records on.

    aiohttp writes a traceback for every malformed request and prints what a stranger sent in full;
    of those one line a second is enough.
    """

    def __init__(self, logs: Logs) -> None:
        super().__init__(logging.WARNING)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        bug = record.exc_info[1] if record.exc_info else None
        if record.name.startswith("aiohttp") and not _is_ours(bug):
            self._logs.refused(type(bug).__name__ if bug else record.name)
            return
        facts: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if bug is not None:
            facts["traceback"] = "".join(traceback.format_exception(bug))
        self._logs.log.log(record.levelno, "library_spoke", **facts)


def _is_ours(bug: BaseException | None) -> bool:
    """Return whether our code is to blame, not the request: aiohttp's own exceptions and broken connections are not."""
    if bug is None or isinstance(bug, ConnectionError | asyncio.CancelledError):
        return False
    return not type(bug).__module__.startswith("aiohttp")
