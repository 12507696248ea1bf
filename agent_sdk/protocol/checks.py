"""Values that people write in Python are held to the types they are declared with, at once: fields and arguments."""

from __future__ import annotations

import inspect
import re
from collections import abc
from collections.abc import Callable
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Struct

from agent_sdk.protocol.errors import InvalidParams

P = ParamSpec("P")
T = TypeVar("T")

_UNSHOWN = ("api_key", "runtime_api_key", "headers", "env", "secrets")
_WORDS = {"str": "text", "array": "a list", "object": "a dict", "null": "None", "PathLike": "a path"}


class Checked(Struct, frozen=True):
    """A struct whose fields are checked when it is made, not only when it is decoded."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InvalidParams: one has a value that its type does not allow; the sentence names it, the limit and the value.
        """
        for name, declared in _declared(type(self)):
            value = getattr(self, name)
            fitting = check(name, value, declared)
            if fitting is not value:
                msgspec.structs.force_setattr(self, name, fitting)


def check(field: str, value: Any, declared: Any) -> Any:
    """Return the value as the declared type has it: a list where a tuple is declared becomes one.

    Raises:
        InvalidParams: the type does not allow it.
    """
    try:
        return msgspec.convert(value, declared)
    except msgspec.ValidationError as exc:
        wanted, _, _ = str(exc).partition(", got ")
        place = re.search(r" - at `(.*)`", str(exc))
    wanted = wanted.partition(" - at ")[0].removeprefix("Expected ").replace("`", "").replace(" | ", " or ")
    if wanted.startswith("Invalid enum value"):
        wanted = _said(declared)
    for word, better in _WORDS.items():
        wanted = re.sub(rf"\b{word}\b", better, wanted)
    at = f" at {place[1].removeprefix('$')}" if place and place[1] != "$" else ""
    raise _refusal(field, f"{wanted}{at}", value)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function: its arguments are checked against their annotations when it is called.

    What a type cannot be asked about at run time (a protocol, the arguments of a function) is let pass.
    Called with a wrong one it raises InvalidParams, which names the argument, what is expected, and the value.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # Python says it better, with the name of the function
            return function(*args, **kwargs)
        for name, value in given.items():
            hint, kind = _hint(function, name), signature.parameters[name].kind
            several = kind is inspect.Parameter.VAR_POSITIONAL
            values = (
                value if several else value.values() if kind is inspect.Parameter.VAR_KEYWORD else (value,)
            )
            for each in values:
                if not _fits(each, hint):
                    raise _refusal(name, _said(hint), each)
        return function(*args, **kwargs)

    return checking


def checked_verbs(kind: type[T]) -> type[T]:
    """Decorate a class: the arguments of its public async methods are checked."""
    for name, function in list(vars(kind).items()):
        if inspect.iscoroutinefunction(function) and not name.startswith("_"):
            setattr(kind, name, checked(function))
    return kind


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


def _refusal(field: str, wanted: str, value: Any) -> InvalidParams:
    given = type(value).__name__ if field in _UNSHOWN else f"{value!r:.64}"
    return InvalidParams(f"{field}: expected {wanted}, got {given}", field=field)


@cache
def _hint(function: Callable[..., Any], name: str) -> Any:
    annotation = inspect.signature(function).parameters[name].annotation
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    try:
        return eval(annotation, inspect.unwrap(function).__globals__)
    except NameError:  # imported for type checkers only
        return Any


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(value, args[0]) and _within(value, hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in args)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in args)
    if origin is abc.Callable:
        return callable(value)
    kind = origin or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is None:
        return value is None
    if not isinstance(kind, type):
        return True
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(type(value), name) for name in vars(kind) if not name.startswith("_"))
    if isinstance(value, str | bytes) and kind not in (str, bytes, object):
        return False  # a text is no list of texts
    if not isinstance(value, kind):
        return False
    if isinstance(value, abc.Mapping):
        return (
            all(_fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()) if args else True
        )
    if isinstance(value, list | tuple | set | frozenset) and args:
        return all(_fits(item, args[0]) for item in value)
    return True


def _within(value: Any, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True


def _said(hint: Any) -> str:
    """The type in words: `text or None`, `one of 'a', 'b'`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [meta for meta in args[1:] if isinstance(meta, msgspec.Meta)]
        bounds = [f">= {meta.ge}" for meta in limits if meta.ge is not None]
        bounds += [f"> {meta.gt}" for meta in limits if meta.gt is not None]
        bounds += [f"<= {meta.le}" for meta in limits if meta.le is not None]
        return " ".join([_said(args[0]), " and ".join(bounds)]).strip()
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


@cache
def _declared(kind: type[Struct]) -> tuple[tuple[str, Any], ...]:
    return tuple((field.name, field.type) for field in msgspec.structs.fields(kind))
