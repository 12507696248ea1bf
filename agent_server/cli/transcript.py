"""A conversation as people read it, shown while it happens; for programs one JSON object per event.

Transcript does no I/O: events and streamed pieces in, pieces of styled text out. What a model or a command said is made
visible there, so that nothing it printed can drive the terminal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, assert_never

import msgspec
from msgspec import Struct

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.conversation.contract import Conversation
from agent_sdk.protocol.errors import visible
from agent_sdk.protocol.events import (
    AgentConfigured,
    AgentMessage,
    ConversationCreated,
    Delta,
    ErrorRaised,
    Event,
    Interrupted,
    LogRecovered,
    ModelFailed,
    ModelUsed,
    PauseRequested,
    RequestOpened,
    RequestResolved,
    SecretsChanged,
    TitleChanged,
    ToolCalled,
    ToolReturned,
    TurnEnded,
    TurnResumed,
    TurnStarted,
    Unknown,
    UserMessage,
    Waiting,
    WorkspaceChanged,
    encode,
)
from agent_server.cli.terminal import (
    STDERR,
    STDOUT,
    Outlet,
    Style,
    Terminal,
    json_line,
    one_line,
    open_terminal,
)

T = TypeVar("T")
_Notice = (
    ConversationCreated
    | AgentConfigured
    | ModelFailed
    | RequestOpened
    | RequestResolved
    | Waiting
    | Interrupted
    | ErrorRaised
    | TitleChanged
    | SecretsChanged
    | WorkspaceChanged
    | TurnResumed
    | LogRecovered
    | Unknown
)
"""Events that take a line in brackets."""

LINES_SHOWN = 12
CHARACTERS_SHOWN = 200
_MARK: dict[str, Style] = {"finished": "green", "failed": "red", "limit": "yellow"}


class Piece(Struct, frozen=True):
    """Some text in one style; newlines are in the text."""

    text: str
    style: Style = ""


class Transcript:
    """Turns the events of one conversation, in their order, into text."""

    def __init__(self, width: int = CHARACTERS_SHOWN) -> None:
        """Begin; tool calls and their results are cut to `width` characters a line."""
        self._width = width
        self._streamed = ""
        self._last_text = ""
        self._input_tokens = self._output_tokens = 0
        self._cost: float | None = None

    def delta(self, delta: Delta) -> list[Piece]:
        """Show a piece of an answer that is being written."""
        if not delta.text:
            return []
        begun = bool(self._streamed)
        self._streamed += delta.text
        text = Piece(visible(delta.text).replace("\n", "\n  "))
        return [text] if begun else [Piece("agent: ", "cyan"), text]

    def event(self, event: Event) -> list[Piece]:
        """Show an event; most take a line, some take none."""
        pieces = self._shown(event)
        if not pieces or isinstance(event, AgentMessage) or not self._streamed:
            return pieces
        # The answer broke off in the middle: what comes next starts on a line of its own.
        self._streamed = ""
        return [Piece("\n"), *pieces]

    def _shown(self, event: Event) -> list[Piece]:
        match event:
            case AgentMessage():
                return self._message(event)
            case ModelUsed():
                self._count(event)
                return []
            case TurnEnded():
                return self._end(event)
            case TurnStarted() | PauseRequested():
                return []
            case UserMessage(text=text):
                return [Piece("you: ", "cyan"), Piece(f"{_indented(visible(text))}\n", "bold")]
            case ToolCalled(tool=tool, arguments=arguments):
                return [Piece(f"{_cut(f'  > {call_line(tool, arguments)}', self._width)}\n", "bold")]
            case ToolReturned():
                return _result(event, self._width)
            case _:
                return _notice(event)

    def _message(self, event: AgentMessage) -> list[Piece]:
        self._last_text = event.text
        streamed, self._streamed = self._streamed, ""
        if streamed and streamed == event.text:
            return [Piece("\n")]
        pieces = [Piece("\n")] if streamed else []
        if event.text:
            pieces += [Piece("agent: ", "cyan"), Piece(f"{_indented(visible(event.text))}\n")]
        return pieces

    def _count(self, event: ModelUsed) -> None:
        self._input_tokens += event.input_tokens
        self._output_tokens += event.output_tokens
        if event.cost is not None:
            self._cost = (self._cost or 0.0) + event.cost

    def _end(self, event: TurnEnded) -> list[Piece]:
        pieces = []
        shown = self._last_text and event.final_text.endswith(
            self._last_text
        )  # the rest of it was shown before
        if event.final_text and not shown:
            pieces += [Piece("agent: ", "cyan"), Piece(f"{_indented(visible(event.final_text))}\n")]
        why = f": {one_line(event.reason)}" if event.reason else ""
        steps = f"{event.iterations} step{'' if event.iterations == 1 else 's'}"
        used = usage(self._input_tokens, self._output_tokens, self._cost)
        pieces.append(Piece(f"[{event.status}{why} - {steps}, {used}]\n", _MARK.get(event.status, "yellow")))
        self._input_tokens = self._output_tokens = 0
        self._cost = None
        return pieces


def usage(input_tokens: int, output_tokens: int, cost: float | None) -> str:
    """Return what a turn consumed, e.g. `1200 tokens in, 80 out, $0.0042`."""
    price = "" if cost is None else f", ${cost:.4f}"
    return f"{input_tokens} tokens in, {output_tokens} out{price}"


def call_line(tool: str, arguments: str) -> str:
    """Return a tool call as one line: a command as it is typed, other calls as `tool name=value …`.

    Line ends are shown as `\\n`: who approves a command must see where the next one begins.
    """
    try:
        given = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _flat(f"{tool} {arguments[:CHARACTERS_SHOWN]}")
    if tool == "terminal" and isinstance(given.get("command"), str):
        return _flat(f"$ {given['command']}")
    if tool == "file_editor":
        return _flat(f"{given.get('command', tool)} {given.get('path', '')}")
    return _flat(" ".join([tool, *(f"{name}={_value(value)}" for name, value in given.items())]))


def _flat(text: str) -> str:
    return visible(text).rstrip("\n").replace("\n", "\\n")


def _value(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _result(event: ToolReturned, width: int) -> list[Piece]:
    lines = visible(event.text).rstrip("\n").split("\n")
    if len(lines) > LINES_SHOWN:
        half = LINES_SHOWN // 2
        lines = [*lines[:half], f"[… {len(lines) - 2 * half} lines …]", *lines[-half:]]
    text = "".join(f"{_cut(f'    {line}', width)}\n" for line in lines if line or len(lines) > 1)
    return [Piece(text, "red" if event.is_error else "dim")] if text else []


def _notice(event: _Notice) -> list[Piece]:
    text, style = _notice_text(event)
    return [Piece(f"[{one_line(text)}]\n", style)] if text else []


def _notice_text(event: _Notice) -> tuple[str, Style]:
    match event:
        case ConversationCreated(conversation=conversation):
            return f"conversation {conversation}", "dim"
        case AgentConfigured(model=model, tools=tools, client_tools=own):
            names = ", ".join([*tools, *(spec.name for spec in own)])
            return f"model {model}; tools: {names or 'none'}", "dim"
        case ModelFailed(error=error, message=message, retry_in=seconds):
            again = "" if seconds is None else f"; trying again in {seconds:.1f} s"
            return f"{error}: {message}{again}", "yellow"
        case RequestOpened(request="approval", tool=tool, arguments=arguments, request_id=request):
            return f"waits for approval of {request}: {call_line(tool, arguments)}", "yellow"
        case RequestOpened(tool=tool):
            return f"waits for the client's tool {tool}", "dim"
        case RequestResolved(answer=answer, reason=reason):
            return f"{answer}{': ' if reason else ''}{reason}", "dim"
        case Waiting(reason=reason):
            return f"waits for {reason}" if reason else "goes on", "yellow" if reason else "dim"
        case Interrupted(reason=reason):
            return f"interrupted{': ' if reason else ''}{reason}", "yellow"
        case ErrorRaised(error=error, message=message):
            return f"{error}: {message}", "red"
        case TitleChanged(title=title):
            return f"title: {title}" if title else "", "dim"
        case SecretsChanged(names=names):
            return f"secrets set: {', '.join(names)}", "dim"
        case TurnResumed():
            return "the turn goes on after a restart", "dim"
        case LogRecovered(reason=reason, after_seq=seq):
            return f"the log was cut after event {seq}: {reason}", "red"
        case WorkspaceChanged(state=state, reason=reason):
            return f"workspace {state}{': ' if reason else ''}{reason}", "dim"
        case Unknown(kind=kind):
            return f"an event of a kind this version does not know: {kind}", "dim"
        case _:
            assert_never(event)


def _indented(text: str) -> str:
    return text.rstrip("\n").replace("\n", "\n  ")


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


class Viewer:
    """Shows events. Its methods are callbacks, so they keep a failure to write for `watch`, which raises it."""

    def __init__(self, terminal: Terminal | None, lines: Outlet) -> None:
        self._terminal = terminal
        self._lines = lines
        self._transcript = Transcript((terminal and terminal.width) or CHARACTERS_SHOWN)
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def event(self, event: Event) -> None:
        """Show an event."""
        if self._terminal is None:
            await self._try(self._lines.write(json_line(encode(event))))
        else:
            await self._try(self._write(self._transcript.event(event)))

    async def delta(self, delta: Delta) -> None:
        """Show a piece of an answer that is being written, where somebody watches."""
        if self._terminal is not None and self._terminal.live:
            await self._try(self._write(self._transcript.delta(delta)))

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the work; when output cannot be written any more, cancel the work.

        Raises:
            BrokenPipeError: nobody reads any more.
            OSError: output could not be written.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._broken}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            return await task
        finally:
            await cancel_and_wait(task)

    async def _write(self, pieces: list[Piece]) -> None:
        if self._terminal is not None:
            for piece in pieces:
                await self._terminal.write(piece.text, piece.style)

    async def _try(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            await writing
        except OSError as exc:
            if not self._broken.done():
                self._broken.set_exception(exc)


async def tell_waits(conversation: Conversation) -> None:
    """Say on standard error what the conversation waits for, if anything."""
    if waiting_for := (await conversation.state()).waiting_for:
        await open_terminal(STDERR).line(f"agent-server: it waits for {one_line(waiting_for)}")


def open_viewer(*, json: bool) -> Viewer:
    """Return a viewer on standard output."""
    return Viewer(None if json else open_terminal(), Outlet(STDOUT))
