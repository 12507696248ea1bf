"""Which middleware an agent has, and all of them in a row, called point by point.

An agent has those of every agent and its own, which are known by name where they come over the wire. What one of them
raises says whose fault it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from agent_sdk.agent.middleware.approval import Approval
from agent_sdk.agent.middleware.iteration_limit import IterationLimit
from agent_sdk.agent.middleware.prompt import Instructions, Prompt
from agent_sdk.agent.middleware.retries import Retries
from agent_sdk.agent.middleware.tool_output import ToolOutput
from agent_sdk.cancellation import is_cancelled
from agent_sdk.middleware import Middleware, ModelCall, RunTool, Section, Stop, TurnContext
from agent_sdk.models import Completion
from agent_sdk.protocol.errors import AgentServerError, InvalidParams, MiddlewareFailed
from agent_sdk.protocol.events import Event, RunStatus, ToolCalled
from agent_sdk.protocol.specs import MiddlewareSpec
from agent_sdk.tools import Tool, ToolResult

T = TypeVar("T")


class Chain:
    """Calls them in order: on the way in the first comes first, on the way back (after a model call, at the end of a
    turn) it comes last, around a tool it is the outermost."""

    def __init__(self, members: Sequence[Middleware]) -> None:
        self._members = tuple(members)
        self._states: dict[int, Any] = {at: None for at, _ in self._at(Middleware.reduce)}
        """By place in the row, of those that reduce the log."""
        self._turn_start = self._at(Middleware.on_turn_start)
        self._prompt = self._at(Middleware.prompt)
        self._before_model = self._at(Middleware.before_model)
        self._after_model = self._at(Middleware.after_model)[::-1]
        self._around_tool = self._at(Middleware.around_tool)
        self._turn_end = self._at(Middleware.on_turn_end)[::-1]
        self.observers = tuple(member.on_event for _, member in self._at(Middleware.on_event))
        """Callbacks for new events."""
        self._failure: MiddlewareFailed | None = None
        """Of one that could not reduce: what it would answer now would be wrong."""

    def __repr__(self) -> str:
        return f"<Chain of {', '.join(map(kind_of, self._members))}>"

    @property
    def reduces(self) -> bool:
        """Whether one of them has a state."""
        return bool(self._states)

    def tools(self) -> Iterator[Tool]:
        """Yield their tools, fresh ones."""
        for member in self._members:
            with named(member):
                yield from member.tools()

    def add(self, event: Event) -> None:
        """Let those that have a state take in the next event of the log. One that raises fails the next turn."""
        for at in self._states:
            member = self._members[at]
            try:
                self._states[at] = member.reduce(self._states[at], event)
            except (Exception, SystemExit) as exc:  # noqa: BLE001  the log goes on, the agent does not
                self._failure = self._failure or _failure(member, exc)

    async def on_turn_start(self, turn: TurnContext) -> None:
        """Begin a turn."""
        for at, member in self._turn_start:
            with named(member):
                await member.on_turn_start(self._known(turn, at))

    async def prompt(self, turn: TurnContext) -> str:
        """Return the system prompt."""
        sections: tuple[Section, ...] = ()
        for at, member in self._prompt:
            with named(member):
                sections = tuple(await member.prompt(self._known(turn, at), sections))
                for section in sections:
                    _check(section, Section, "prompt")
        return "\n\n".join(section.text for section in sections)

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        """Return the request as it is sent."""
        for at, member in self._before_model:
            with named(member):
                request = _check(
                    await member.before_model(self._known(turn, at), request), ModelCall, "before_model"
                )
        return request

    async def after_model(self, turn: TurnContext, answer: Completion) -> Completion:
        """Return the answer as it is written."""
        for at, member in self._after_model:
            with named(member):
                answer = _check(
                    await member.after_model(self._known(turn, at), answer), Completion, "after_model"
                )
        return answer

    async def around_tool(self, turn: TurnContext, call: ToolCalled, run: RunTool) -> ToolResult:
        """Run a call within all of them."""
        for at, member in reversed(self._around_tool):
            run = partial(self._around, at, member, turn, run)
        return await run(call)

    async def on_turn_end(self, turn: TurnContext, status: RunStatus) -> None:
        """End a turn; one that wants to stop it then is late."""
        for at, member in self._turn_end:
            with suppress(Stop), named(member):
                await member.on_turn_end(self._known(turn, at), status)

    async def _around(
        self, at: int, member: Middleware, turn: TurnContext, run: RunTool, call: ToolCalled
    ) -> ToolResult:
        with named(member):
            result = await member.around_tool(self._known(turn, at), call, run)
            return _check(result, ToolResult, "around_tool")

    def _at(self, point: Callable[..., Any]) -> list[tuple[int, Middleware]]:
        """Return those that override a point, and their places in the row."""
        return [
            (at, member)
            for at, member in enumerate(self._members)
            if getattr(type(member), point.__name__) is not point
        ]

    def _known(self, turn: TurnContext, at: int) -> TurnContext:
        if self._failure is not None:
            raise self._failure
        return replace(turn, state=self._states[at]) if at in self._states else turn


def kind_of(middleware: Middleware) -> str:
    """Return the name of its class as words."""
    return str(middleware.__struct_config__.tag)


@contextmanager
def named(middleware: Middleware) -> Iterator[None]:
    """Let what a middleware raises say whose it is.

    Raises:
        MiddlewareFailed: it raised what is no AgentServerError and no Stop.
    """
    try:
        yield
    except (AgentServerError, Stop):
        raise
    except BaseException as exc:
        if isinstance(exc, GeneratorExit) or (isinstance(exc, asyncio.CancelledError) and is_cancelled()):
            raise
        raise _failure(middleware, exc) from exc


def _failure(middleware: Middleware, exc: BaseException) -> MiddlewareFailed:
    kind = kind_of(middleware)
    return MiddlewareFailed(f"middleware {kind}: {type(exc).__name__}: {exc}", middleware=kind)


def _check(value: Any, kind: type[T], point: str) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{point} returned {type(value).__name__}, not {kind.__name__}")
    return value


ENTRY_POINTS = "agent_server.middleware"
"""The group in which installed packages name their middleware: kind = module:Class."""


def chain_of(own: Sequence[Middleware], *, instructions: str) -> Chain:
    """Return what the loop calls, in this order.

    | middleware | why there |
    | --- | --- |
    | IterationLimit | before anything is done for a request that is not sent |
    | ToolOutput | around all others: whatever they return is cut |
    | Approval | sees the answer last, as the others have left it |
    | Prompt | what never changes comes first |
    | those of the agent | in the order in which it names them |
    | Instructions | last in the prompt |
    | Retries | next to the model, whoever that is by then |
    """
    before = (IterationLimit(), ToolOutput(), Approval(), Prompt())
    return Chain((*before, *own, Instructions(text=instructions), Retries()))


def made_of(spec: MiddlewareSpec) -> Middleware:
    """Return the middleware that a spec describes.

    Raises:
        InvalidParams: nobody has installed it here, or its options are not acceptable.
    """
    from importlib.metadata import entry_points  # noqa: PLC0415  costs much, and hardly any agent names one

    for entry in entry_points(group=ENTRY_POINTS, name=spec.kind):
        kind = entry.load()
        try:
            made: Middleware = msgspec.convert(spec.options, kind)
        except msgspec.ValidationError as exc:
            raise InvalidParams(f"middleware: {spec.kind}: {exc}", field="middleware") from None
        return made
    raise InvalidParams(
        f"middleware: there is no {spec.kind[:64]!r} where the agent runs; install a package there that names it as an "
        f"entry point in the group {ENTRY_POINTS}",
        field="middleware",
    )
