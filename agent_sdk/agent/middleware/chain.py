"""Which middleware an agent has, and all of them in a row, called point by point.

An agent has those of every agent and its own, which are known by name where they come over the wire. What one of them
raises says whose fault it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

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

_Point = Callable[..., Awaitable[Any]]


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
        self.observers = tuple(point for _, point in self._at(Middleware.on_event))
        """Callbacks for new events."""
        self._failure: MiddlewareFailed | None = None
        """Of one that could not reduce: what it would answer now would be wrong."""

    def __repr__(self) -> str:
        return f"<Chain of {', '.join(map(kind_of, self._members))}>"

    @property
    def reduces(self) -> bool:
        """Whether one of them has a state."""
        return bool(self._states)

    @property
    def ends_turns(self) -> bool:
        """Whether one of them does something before the end of a turn."""
        return bool(self._turn_end)

    def tools(self) -> Iterator[Tool]:
        """Yield their tools, fresh ones."""
        for member in self._members:
            try:
                yield from member.tools()
            except BaseException as exc:  # noqa: BLE001  raised again, with its name
                _blame(exc, member)

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
        for at, point in self._turn_start:
            await self._call(at, point, None, turn)

    async def prompt(self, turn: TurnContext) -> str:
        """Return the system prompt."""
        sections: tuple[Section, ...] = ()
        for at, point in self._prompt:
            given: Any = await self._call(at, point, Sequence, turn, sections)
            for section in given:
                if not isinstance(section, Section):
                    wrong = TypeError(f"prompt returned {type(section).__name__}, not Section")
                    raise _failure(self._members[at], wrong)
            sections = tuple(given)
        return "\n\n".join([section.text for section in sections])

    async def before_model(self, turn: TurnContext, request: ModelCall) -> ModelCall:
        """Return the request as it is sent."""
        for at, point in self._before_model:
            request = await self._call(at, point, ModelCall, turn, request)
        return request

    async def after_model(self, turn: TurnContext, answer: Completion) -> Completion:
        """Return the answer as it is written."""
        for at, point in self._after_model:
            answer = await self._call(at, point, Completion, turn, answer)
        return answer

    async def around_tool(self, turn: TurnContext, call: ToolCalled, run: RunTool) -> ToolResult:
        """Run a call within all of them."""

        def within(at: int, point: _Point, run: RunTool) -> RunTool:
            return lambda call: self._call(at, point, ToolResult, turn, call, run)

        for at, point in reversed(self._around_tool):
            run = within(at, point, run)
        return await run(call)

    async def on_turn_end(self, turn: TurnContext, status: RunStatus) -> None:
        """End a turn; one that wants to stop it then is late."""
        for at, point in self._turn_end:
            with suppress(Stop):
                await self._call(at, point, None, turn, status)

    def _at(self, point: Callable[..., Any]) -> list[tuple[int, _Point]]:
        """Return the points of those that override it, and their places in the row."""
        name = point.__name__
        return [
            (at, getattr(member, name))
            for at, member in enumerate(self._members)
            if getattr(type(member), name) is not point
        ]

    async def _call(self, at: int, point: _Point, kind: type | None, turn: TurnContext, *given: Any) -> Any:
        """Return what a member returns at a point; what it raises says whose it is.

        Raises:
            MiddlewareFailed: it raised what is no AgentServerError and no Stop, or returned what is not of the kind.
        """
        if self._failure is not None:
            raise self._failure
        if at in self._states:
            turn = replace(turn, state=self._states[at])
        try:
            result = await point(turn, *given)
            if kind is not None and not isinstance(result, kind):
                raise TypeError(f"{point.__name__} returned {type(result).__name__}, not {kind.__name__}")
        except BaseException as exc:  # noqa: BLE001  raised again, with its name
            _blame(exc, self._members[at])
        return result


def kind_of(middleware: Middleware) -> str:
    """Return the name of its class as words."""
    return str(middleware.__struct_config__.tag)


def _blame(exc: BaseException, middleware: Middleware) -> NoReturn:
    """Raise what a middleware raised, so that it says whose it is; a cancellation of this task is nobody's."""
    if isinstance(exc, AgentServerError | Stop | GeneratorExit) or (
        isinstance(exc, asyncio.CancelledError) and is_cancelled()
    ):
        raise exc
    raise _failure(middleware, exc) from exc


def _failure(middleware: Middleware, exc: BaseException) -> MiddlewareFailed:
    kind = kind_of(middleware)
    return MiddlewareFailed(f"middleware {kind}: {type(exc).__name__}: {exc}", middleware=kind)


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
