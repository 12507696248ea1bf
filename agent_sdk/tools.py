"""The contract of a Tool: a typed function the model may call, and `@tool`, which makes one of a Python function."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, get_type_hints, overload, runtime_checkable

import msgspec
from msgspec import Struct

from agent_sdk.cancellation import is_cancelled
from agent_sdk.protocol.checks import ToolName, checked
from agent_sdk.protocol.errors import ToolError
from agent_sdk.protocol.specs import ToolSpec
from agent_sdk.workspace.contract import Workspace

P = ParamSpec("P")
R = TypeVar("R")

_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


class ToolResult(Struct, frozen=True, kw_only=True):
    """What the model, and programs, get to see of a call: text that is UTF-8, and data that is JSON.

    What a tool gives otherwise is made so: `?` for what UTF-8 cannot say, text for bytes and for data.
    """

    text: str
    is_error: bool = False
    data: dict[str, Any] = {}
    """JSON-able facts for programs, e.g. exit_code."""
    bytes_cut: int = 0
    """Bytes of it that `text` lacks already."""

    def __post_init__(self) -> None:
        set_now = msgspec.structs.force_setattr
        if not isinstance(self.text, str) or not self.text.isascii():
            set_now(self, "text", as_utf8(self.text))
        if self.data:
            try:
                msgspec.json.encode(self.data)
            except (TypeError, ValueError, RecursionError, OverflowError):
                shown = as_utf8(repr(self.data))
                set_now(self, "data", {"repr": shown if len(shown) <= 1000 else f"{shown[:999]}…"})


class HidePart(Protocol):
    """Hides secrets in what is a part of a longer text."""

    def __call__(self, text: str, *, begun: bool = False, cut: bool = False) -> str:
        """Return the text without secrets, and without what is left of those at its ends.

        Args:
            text: the part.
            begun: something came before it, where a secret may have begun.
            cut: more would have come, the rest of a secret perhaps.
        """
        ...


def _as_it_is(text: str, *, begun: bool = False, cut: bool = False) -> str:
    return text


class ToolContext(Struct, frozen=True, kw_only=True):
    """What a tool may use."""

    workspace: Workspace
    secrets: Mapping[str, str] = {}
    """Environment variables for commands; their values are masked in results."""
    part: HidePart = _as_it_is
    """Hides what is left of secrets where a text was cut; whole ones are hidden in every result anyway."""
    call_key: str = ""
    """Of this call and no other, in whatever process it is run or taken up again."""
    same_place: bool = True
    """For `resume`: the workspace is the one in which the call began, with all that ran there."""
    leaving: Callable[[], bool] = lambda: False
    """Returns whether another process goes on with the call: what it has begun in the workspace then stays, although
    the call is cancelled here."""


class Tool(Protocol):
    """One per conversation, so it may keep state between calls; calls of one tool never overlap unless read-only."""

    @property
    def spec(self) -> ToolSpec:
        """Name, description, JSON Schema."""
        ...

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Run one call.

        Args:
            arguments: JSON text as the model wrote it, possibly malformed.

        Raises:
            ToolError, AgentServerError, OSError: the model reads the message as the result of the call; wrong
                arguments are a ToolError that names the field.
        """
        ...


@runtime_checkable
class Resumable(Protocol):
    """A Tool whose calls outlive the process that made them, or leave enough behind to be told apart."""

    async def resume(self, arguments: str, context: ToolContext) -> ToolResult:
        """Take up a call that may have begun before the process that ran it ended; never run it twice.

        Raises:
            OutcomeUnknown: whether and how far it was carried out cannot be found out.
            ToolError, AgentServerError, OSError: the model reads the message.
        """
        ...

    async def abandon(self, arguments: str, context: ToolContext) -> None:
        """End what such a call still runs in the same place; nobody waits for its result any more."""
        ...


class FunctionTool(Generic[P, R]):
    """A Python function as a tool; made by `@tool`, still callable as before, with the same type."""

    @checked
    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: ToolName | None = None,
        read_only: bool = False,
        idempotent: bool = False,
    ) -> None:
        update_wrapper(self, function)
        self.function = function
        self._arguments = _arguments_struct(function)
        self.spec = ToolSpec(
            name=name or function.__name__,
            description=inspect.getdoc(function) or function.__name__,
            parameters=parameters_of(self._arguments),
            read_only=read_only,
            idempotent=idempotent,
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tool {self.spec.name}>"

    async def run(self, arguments: str, context: ToolContext | None = None) -> ToolResult:
        """Call the function. What it raises becomes an error result with the exception's text.

        A plain function runs in a thread, so that it may block; cancelling does not stop the thread.
        """
        values = decode_arguments(arguments, self._arguments)
        given = {name: getattr(values, name) for name in self._arguments.__struct_fields__}
        function: Callable[..., Any] = self.function
        if not inspect.iscoroutinefunction(function):
            return await asyncio.to_thread(_block, function, given)
        try:
            return ToolResult(text=_as_text(await function(**given)))
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and is_cancelled():
                raise
            return failed(exc)


def _block(function: Callable[..., Any], given: dict[str, Any]) -> ToolResult:
    try:
        return ToolResult(text=_as_text(function(**given)))
    except BaseException as exc:  # noqa: BLE001  a thread could not even pass on a StopIteration
        return failed(exc)


def failed(exc: BaseException) -> ToolResult:
    """Return the result of a call that raised, `SystemExit` included: what the model reads instead."""
    try:
        said = str(exc)
    except Exception:  # noqa: BLE001  the exception is the user's, too
        said = ""
    return ToolResult(text=f"{type(exc).__name__}: {said}", is_error=True)


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...


@overload
def tool(
    *, name: str | None = None, read_only: bool = False, idempotent: bool = False
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: ToolName | None = None,
    read_only: bool = False,
    idempotent: bool = False,
) -> FunctionTool[P, R] | Callable[[Callable[P, R]], FunctionTool[P, R]]:
    """Make a tool of a plain or async function.

    The schema comes from its signature, the description from its docstring. Every parameter needs
    a type that msgspec can describe; the result is text, or becomes JSON text.

    Args:
        function: what the tool does.
        name: instead of the function's.
        read_only: it changes nothing: it may run beside others and needs no approval.
        idempotent: it may run again when a crash left open whether it had run.

    Raises:
        TypeError: a parameter has no annotation, or is `*args` or `**kwargs`.
    """
    if function is None:
        return lambda decorated: FunctionTool(
            decorated, name=name, read_only=read_only, idempotent=idempotent
        )
    return FunctionTool(function, name=name, read_only=read_only, idempotent=idempotent)


def decode_arguments(arguments: str, into: type[Any]) -> Any:
    """Decode a model's JSON arguments.

    Raises:
        ToolError: not JSON, or a field is wrong, missing or unknown; the message names it.
    """
    try:
        return msgspec.json.decode("{}" if arguments.strip() in ("", "null") else arguments, type=into)
    except msgspec.ValidationError as exc:
        raise ToolError(f"invalid arguments: {exc}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise ToolError(f"the arguments are not valid JSON: {exc}") from None


def is_json_object(arguments: str) -> bool:
    """Whether the arguments of a call are an object of JSON that came to its end."""
    try:
        _object.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return True


def parameters_of(arguments: type[Struct]) -> dict[str, Any]:
    """Return the JSON Schema of a tool's arguments: an object, with `$defs` only where types are nested."""
    schema = _inlined(msgspec.json.schema(arguments))
    schema.pop("title", None)
    schema.pop("description", None)
    return schema


def _arguments_struct(function: Callable[..., Any]) -> type[Struct]:
    hints = get_type_hints(function, include_extras=True)
    fields: list[Any] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"tool {function.__name__}: parameter {parameter} cannot be described to a model")
        if parameter.name not in hints:
            raise TypeError(f"tool {function.__name__}: parameter {parameter.name} needs a type annotation")
        field = (parameter.name, hints[parameter.name])
        fields.append(field if parameter.default is parameter.empty else (*field, parameter.default))
    return msgspec.defstruct(function.__name__, fields, kw_only=True, forbid_unknown_fields=True)


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with `$ref: #/$defs/Top` at its root, as msgspec writes it, with the root in place."""
    definitions = schema.get("$defs", {})
    root = schema.get("$ref", "").removeprefix("#/$defs/")
    if root not in definitions:
        return dict(schema)
    others = {name: value for name, value in definitions.items() if name != root}
    return {**definitions[root], **({"$defs": others} if others else {})}


def as_utf8(text: object) -> str:
    """Return text, or bytes as text, with U+FFFD for what UTF-8 cannot say: lone surrogates, wrong bytes.

    Two surrogates that belong together become their character.
    """
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text).decode(errors="replace")
    text = str(text)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _as_text(result: object) -> str:
    if isinstance(result, str | bytes | bytearray | memoryview):
        return as_utf8(result)
    if result is None:
        return "done"
    return msgspec.json.encode(result).decode()
