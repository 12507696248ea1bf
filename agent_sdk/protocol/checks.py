"""Types of arguments with their limits, and what holds to them, at once, the values that people write in Python."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from collections import abc
from collections.abc import Callable, Iterable
from functools import cache, wraps
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import msgspec
from msgspec import Meta, Struct

from agent_sdk.protocol.errors import InvalidParams

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")
Test = Callable[[Any], bool]

_UNSHOWN = ("api_key", "runtime_api_key", "headers", "env", "secrets")
_WORDS = {"str": "text", "array": "a list", "object": "a dict", "null": "None", "PathLike": "a path"}


class ForSystem:
    """Marks text for the operating system, which takes bytes that are no UTF-8 (surrogate escapes), but no NUL."""


OsText = Annotated[str, ForSystem]


class Checked(Struct, frozen=True):
    """A struct whose fields are checked when it is made, not only when it is decoded."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InvalidParams: one has a value that its type does not allow; the sentence names it, the limit and the value.
        """
        for name, declared, is_for_system in _declared(type(self)):
            value = getattr(self, name)
            try:
                fitting = msgspec.convert(value, declared)  # a list where a tuple is declared becomes one
            except msgspec.ValidationError as exc:
                raise _misfit(name, value, declared, str(exc)) from None
            if fitting is not value:
                msgspec.structs.force_setattr(self, name, fitting)
            if value is None or isinstance(value, int):
                continue
            if wrong := flaw(value) or (is_for_system and flaw(value, for_system=True)):
                raise _refusal(name, "", value, wrong)


def _misfit(field: str, value: Any, declared: Any, problem: str) -> InvalidParams:
    place = re.search(r" - at `(\$[^`]*)`$", problem)
    wanted = problem.partition(", got ")[0]
    wanted = wanted.partition(" - at ")[0].removeprefix("Expected ").replace("`", "").replace(" | ", " or ")
    if wanted.startswith("Invalid enum value") or "matching regex" in wanted:
        wanted = _said(declared)
    for word, better in _WORDS.items():
        wanted = re.sub(rf"\b{word}\b", better, wanted)
    at = f" at {place[1].removeprefix('$')}" if place and place[1] != "$" else ""
    return _refusal(field, f"{wanted}{at}", value)


def checked(function: Callable[P, T], contract: Callable[..., Any] | None = None) -> Callable[P, T]:
    """Decorate a function: its arguments are checked against their annotations when it is called.

    What a type cannot be asked about at run time (the arguments of a function) is let pass. Called with a wrong
    value it raises InvalidParams, which names the argument, what is expected, and the value.

    Args:
        function: what is called.
        contract: a function whose annotations count before its own.
    """

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        positional, named, several, others = _rules(function, contract or function)
        for (name, hint, fits, default), value in zip(positional, args, strict=False):
            if fits is not None and value is not default and not fits(value):
                raise _refused(name, hint, value)
        for name, value in kwargs.items():
            name, hint, fits, default = named.get(name, others)
            if fits is not None and value is not default and not fits(value):
                raise _refused(name, hint, value)
        name, hint, fits, _ = several
        for value in args[len(positional) :]:
            if fits is not None and not fits(value):
                raise _refused(name, hint, value)
        return function(*args, **kwargs)  # Python itself says best which are missing, or too many

    return checking


class Verbs(Protocol):
    """A contract that is checked: whoever inherits from it has the arguments of its public methods checked.

    What the contract says of an argument counts; of what it does not have, the method itself.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if getattr(cls, "_is_protocol", False):
            return
        contracts = [vars(base) for base in cls.__mro__ if getattr(base, "_is_protocol", False)]
        for name, function in list(vars(cls).items()):
            if inspect.isfunction(function) and not name.startswith("_"):
                contract = next((members[name] for members in contracts if name in members), None)
                setattr(cls, name, checked(function, contract))


class Options:
    """Options as a frozen dataclass, declared once: each is checked against its type when they are made."""

    def __post_init__(self) -> None:
        """Check the fields, those of the bases first.

        Raises:
            InvalidParams: one has a value that its type does not allow; the sentence names it, its type, and the value.
        """
        this: Any = self
        defaults = {field.name: field.default for field in dataclasses.fields(this)}
        bases = reversed(type(self).__mro__)  # what a class says of a field counts, not what its bases say
        declared = {name: cls for cls in bases for name in inspect.get_annotations(cls) if name in defaults}
        for name, cls in declared.items():
            hint = _evaluated(cls.__annotations__[name], vars(sys.modules[cls.__module__]))
            fits, value = _test(hint), getattr(self, name)
            if fits is not None and value is not defaults[name] and not fits(value):
                raise _refused(name, hint, value)


def taking(options: Callable[P, T]) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """Decorate an `__init__` that gets options as one object: whoever calls it passes the options themselves."""

    def decorated(init: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        @wraps(options.__init__)
        def __init__(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, options(*args, **kwargs))

        __init__.__doc__ = init.__doc__
        options.__init__.__qualname__ = init.__qualname__  # by which Python says what is missing
        return __init__

    return decorated


def check_input(stdin: bytes | str | None) -> bytes:
    """Return what a command is to read, as bytes.

    Raises:
        InvalidParams: it is neither bytes nor text, or half a character is in it.
    """
    match stdin:
        case None:
            return b""
        case str():
            try:
                return stdin.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise InvalidParams("stdin: contains a lone surrogate", field="stdin") from None
        case bytes():
            return stdin
    raise _refusal("stdin", "bytes or text", stdin)


def whole(text: str) -> int | None:
    """Return the number that a text from elsewhere is, of at most 18 digits; None: it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def flaw(value: Any, *, for_system: bool = False) -> str:
    """Return what is wrong with texts and numbers in a value that nobody can send or store; empty: nothing."""
    if isinstance(value, str):
        if for_system and "\0" in value:
            return "contains a NUL character"
        try:
            value.isascii() or value.encode("utf-8", "surrogateescape" if for_system else "strict")
        except UnicodeEncodeError:
            return "contains a lone surrogate, half a character, which UTF-8 cannot say"
    elif isinstance(value, float):
        return "" if math.isfinite(value) else "is no finite number"
    elif isinstance(value, abc.Mapping | list | tuple | set | frozenset):
        if isinstance(value, abc.Mapping):
            parts = [*((key, key) for key in value), *value.items()]
        else:
            parts = list(enumerate(value))
        wrongs = ((at, flaw(part, for_system=for_system)) for at, part in parts)
        return next((f"{wrong} at [{at!r:.40}]" for at, wrong in wrongs if wrong), "")
    return ""


def _refused(field: str, hint: Any, value: Any) -> InvalidParams:
    return _refusal(field, _said(hint), value, flaw(value, for_system=_is_for_system(hint)))


def _refusal(field: str, wanted: str, value: Any, wrong: str = "") -> InvalidParams:
    try:
        given = type(value).__name__ if field in _UNSHOWN else f"{value!r:.64}"
    except ValueError:  # a number with more digits than Python writes
        given = type(value).__name__
    return InvalidParams(f"{field}: {wrong or f'expected {wanted}'}, got {given}", field=field)


def _is_for_system(hint: Any) -> bool:
    return hint is ForSystem or any(map(_is_for_system, get_args(hint)))


_Rule = tuple[str, Any, Test | None, Any]
"""Of an argument: its name, its type, what tells whether a value is of it (None: every value is), its default, which is
of it without being asked about."""


@cache
def _rules(
    function: Callable[..., Any], contract: Callable[..., Any]
) -> tuple[list[_Rule], dict[str, _Rule], _Rule, _Rule]:
    """Return the rules of arguments by position, of those by name, of `*args`, of `**kwargs`."""
    positional: list[_Rule] = []
    named: dict[str, _Rule] = {}
    several: _Rule = ("", Any, None, None)
    others: _Rule = several
    known = inspect.signature(contract).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        hint = _hint(contract if name in known else function, name)
        rule: _Rule = (name, hint, _test(hint), parameter.default)
        match parameter.kind:
            case parameter.VAR_POSITIONAL:
                several = rule
            case parameter.VAR_KEYWORD:
                others = rule
            case parameter.KEYWORD_ONLY:
                named[name] = rule
            case _:
                positional.append(rule)
                named[name] = rule
    return positional, named, several, others


def _hint(function: Callable[..., Any], name: str) -> Any:
    annotation = inspect.signature(function).parameters[name].annotation
    if annotation is inspect.Parameter.empty:
        return Any
    return _evaluated(annotation, inspect.unwrap(function).__globals__)


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except NameError:  # imported for type checkers only
        return Any


def _test(hint: Any) -> Test | None:
    """Return what tells whether a value is of a type; None: it cannot be asked about."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _limited(hint)
    if origin in (Union, UnionType):
        return _either([_test(each) for each in args])
    if origin is Literal:
        return lambda value: any(value == each and type(value) is type(each) for each in args)
    if origin is abc.Callable:
        return callable
    kind = origin or hint
    if kind is None:
        return lambda value: value is None
    if kind in (Any, object) or not isinstance(kind, type):
        return None
    if getattr(kind, "_is_protocol", False):
        names = [name for name in vars(kind) if not name.startswith("_")]
        return lambda value: all(hasattr(type(value), name) for name in names)
    if kind in _TESTS:
        return _TESTS[kind]
    if hasattr(kind, "__fspath__"):
        return _is_path
    if issubclass(kind, abc.Iterable) and args:
        return _container(kind, [_test(each) for each in args])
    return lambda value: isinstance(value, kind)


def _is_path(value: Any) -> bool:
    return hasattr(value, "__fspath__") and not flaw(value.__fspath__(), for_system=True)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or not flaw(value))


def _is_system_text(value: Any) -> bool:
    return (
        isinstance(value, str) and "\0" not in value and (value.isascii() or not flaw(value, for_system=True))
    )


_TESTS: dict[type, Test] = {
    str: _is_text,
    bytes: lambda value: isinstance(value, bytes | bytearray),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: lambda value: (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value)
        <= sys.float_info.max  # of a longer number math.isfinite says nothing but OverflowError
    ),
}


def _either(tests: list[Test | None]) -> Test | None:
    asked = [test for test in tests if test is not None]
    if len(asked) < len(tests):
        return None

    if len(asked) == 2:  # most are: something, or None
        first, second = asked
        return lambda value: first(value) or second(value)
    return lambda value: any(test(value) for test in asked)


def _limited(hint: Any) -> Test | None:
    kind, *marks = get_args(hint)
    fits = _is_system_text if ForSystem in marks else _test(kind)
    if fits is None or not any(isinstance(mark, Meta) for mark in marks):
        return fits

    def within(value: Any) -> bool:
        try:
            msgspec.convert(value, hint)
        except msgspec.ValidationError:
            return False
        return True

    return lambda value: fits(value) and within(value)


def _container(kind: type, tests: list[Test | None]) -> Test:
    kinds = (list, tuple) if kind in (list, tuple) else (kind,)

    def fits(value: Any) -> bool:
        if isinstance(value, str | bytes) or not isinstance(value, kinds):
            return False  # a text is no list of texts
        if isinstance(value, abc.Mapping) and len(tests) != 2:
            return False
        if isinstance(value, abc.Mapping):
            columns: Iterable[Iterable[Any]] = (value.keys(), value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            columns = (value,)
        else:
            return True  # looked at when it is used up
        for test, items in zip(tests, columns, strict=False):
            if test is not None and not all(map(test, items)):
                return False
        return True

    return fits


def _said(hint: Any) -> str:
    """Return the type in words: `text or None`, `one of 'a', 'b'`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [meta for meta in args[1:] if isinstance(meta, Meta)]
        bounds = [
            f"{sign} {getattr(meta, name)}"
            for meta in limits
            for name, sign in _SIGNS
            if getattr(meta, name) is not None
        ]
        said = [meta.description for meta in limits if meta.description is not None]
        return said[0] if said else " ".join([_said(args[0]), " and ".join(bounds)]).strip()
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_said(each) for each in args))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}" if len(args) > 1 else repr(args[0])
    if origin is abc.Callable:
        return "a function"
    kind = origin or hint
    if kind in (None, NoneType):
        return "None"
    if isinstance(kind, type) and issubclass(kind, abc.Mapping):
        return f"a dict of {_said(args[0])} to {_said(args[1])}" if args else "a dict"
    if isinstance(kind, type) and issubclass(kind, abc.Iterable) and kind not in (str, bytes):
        items = _said(args[0]).replace("a function", "functions") if args else ""
        return f"a list of {items}" if items else "a list"
    name = getattr(kind, "__name__", str(kind))
    return _WORDS.get(name, name)


_SIGNS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@cache
def _declared(kind: type[Struct]) -> tuple[tuple[str, Any, bool], ...]:
    fields = msgspec.structs.fields(kind)
    return tuple((field.name, field.type, _is_for_system(field.type)) for field in fields)


Path = OsText
Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9_.-]+(?!\n)$",
        description="1 to 64 letters, digits, '_', '.' and '-'",
    ),
]
OpId = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        max_length=36,
        description="a UUID as lower-case text, like str(uuid.uuid4())",
    ),
]
Limit = Annotated[float, Meta(ge=0.001, le=86_400, description="0.001..86400 seconds")]
Heartbeat = Annotated[float, Meta(ge=0.01, le=3600, description="0.01..3600 seconds")]
Patience = Annotated[float, Meta(ge=0, le=1e9, description="0 or more seconds")]
"""How long somebody waits."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1, description="a number of bytes from 0 to 2**63-1")]
Seq = Annotated[int, Meta(ge=0, le=2**53, description="the seq of an event, 0 or more")]
Page = Annotated[int, Meta(ge=1, le=1000, description="1..1000")]
Cells = Annotated[int, Meta(ge=1, le=65535, description="1..65535")]
Mode = Annotated[int, Meta(ge=0, le=0o777, description="0..0o777")]
Depth = Annotated[int, Meta(ge=1, le=64, description="1..64")]
Until = Annotated[bytes, Meta(min_length=1, max_length=1024, description="1..1024 bytes")]
Secrets = dict[OsText, OsText]
Title = Annotated[str, Meta(max_length=1024, description="text of at most 1024 characters")]
Tags = Annotated[dict[str, str], Meta(max_length=64, description="a dict of at most 64 texts to texts")]
Reason = Annotated[str, Meta(max_length=1024, description="text of at most 1024 characters")]
Comment = Annotated[str, Meta(max_length=8192, description="text of at most 8192 characters")]
Iterations = Annotated[int, Meta(ge=1, le=1_000_000, description="1..1000000")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Label = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=512,
        pattern=r"^[!-~]+(?!\n)$",
        description="1 to 512 printable ASCII characters without spaces",
    ),
]
HeaderName = Annotated[
    str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+(?!\n)$", description="names and values of HTTP headers")
]
Header = Annotated[
    str, Meta(pattern=r"^[\t -~\x80-\xff]*(?!\n)$", description="names and values of HTTP headers")
]
ApiKey = Annotated[
    str, Meta(pattern=r"^\s*[!-~]*\s*$", description="printable ASCII characters without spaces")
]
ToolName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}(?!\n)$",
        description="1 to 64 letters, digits, _ and -, no digit first",
    ),
]
Platform = Annotated[
    str, Meta(pattern=r"^[a-z0-9]+/[a-z0-9_]+(/[a-z0-9]+)?(?!\n)$", description="text like linux/amd64")
]
Gpus = Annotated[
    str,
    Meta(
        pattern=r"^(all|[0-9]{1,3}|[A-Za-z0-9][A-Za-z0-9-]{0,63}(,[A-Za-z0-9][A-Za-z0-9-]{0,63}){0,31})(?!\n)$",
        description="`all`, a number, or ids separated by commas",
    ),
]
User = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[A-Za-z0-9_.-]{1,31})?(?!\n)$",
        max_length=64,
        description="a name or a number, like root",
    ),
]
Variable = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,255}(?!\n)$", description="names of variables")
]
Mount = Annotated[
    str, Meta(pattern=r"^/[^:\x00]*:/[^:\x00]+(:(ro|rw))?(?!\n)$", description="/host/path:/path/in/it[:ro]")
]
Folder = Annotated[str, Meta(pattern=r"^/[^:\x00]+$", description="absolute paths like /data")]
