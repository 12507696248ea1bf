"""What every method is: a class whose fields are the params.

Calls leave out the fields that stand at their default, so that an older version, which refuses fields it does not
know, accepts all calls that need nothing new. A default therefore never changes its meaning.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct

from agent_sdk.protocol.checks import Name, OpId

__all__ = [
    "Argument",
    "Channel",
    "Done",
    "Effect",
    "Method",
    "Ms",
    "Name",
    "Notice",
    "Offset",
    "OpId",
    "Path",
    "R",
    "Stream",
    "UserName",
    "result_type",
    "varying",
]

R = TypeVar("R")

Ms = Annotated[int, Meta(ge=1, le=86_400_000)]
Path = Annotated[str, Meta(min_length=1, max_length=4096)]
Channel = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Offset = Annotated[int, Meta(ge=0, le=2**53)]
UserName = Annotated[
    str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_.-]+)?$")
]
Argument = Annotated[str, Meta(max_length=131_071)]


class Stream(NamedTuple):
    """A byte stream of a call, by the names of the fields that are about it; an empty name: there is no such field."""

    channel: str = "channel"
    """The param with its number."""
    since: str = "since"
    """The param that says what of it came over other channels."""
    size: str = ""
    """In the answer: how long it was."""
    text: str = ""
    """In the answer: all of it, where there was no channel for it."""
    follow: str = ""
    """The param that says whether it is sent while the call runs."""


class Method(Struct, Generic[R], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON-RPC method."""

    method: ClassVar[str]
    takes: ClassVar[tuple[Stream, ...]] = ()
    """The byte streams that come from its caller."""
    gives: ClassVar[tuple[Stream, ...]] = ()
    """Those that go to its caller."""


class Effect(Method[R], frozen=True, kw_only=True):
    """A method that changes something: carried out once per op_id."""

    begins: ClassVar[bool] = False
    """Whether it is refused or begins: what becomes of it then is no error of the call, or is undone."""
    op_id: OpId


class Notice(Struct, frozen=True, kw_only=True):
    """A JSON-RPC notification; it tolerates unknown fields."""

    method: ClassVar[str]


class Done(Struct, frozen=True):
    """The answer of a method that has nothing to tell."""


def result_type(method: type[Method[R]]) -> type[R]:
    """Return the R of a method class."""
    found: Any = method
    return get_args(found.__orig_bases__[0])[0]  # type: ignore[no-any-return]


@cache
def varying(method: type[Method[Any]]) -> frozenset[str]:
    """Return the params that differ whenever a call is repeated, and do not belong to what it asks for."""
    streams = (*method.takes, *method.gives)
    return frozenset(name for stream in streams for name in (stream.channel, stream.since, stream.follow))


def without_defaults(value: Any, *, everywhere: bool = False) -> Any:
    """Return a struct as what JSON is made of, down to the structs in it, without the fields at their default.

    Args:
        everywhere: also those that tolerate unknown fields, and else are written whole: for what is compared.
    """
    if isinstance(value, list | tuple):
        return [without_defaults(each, everywhere=everywhere) for each in value]
    if not isinstance(value, Struct):
        return value
    tag, defaults, is_strict = _shape(type(value))
    written = dict(tag)
    for name, default in defaults:
        each = getattr(value, name)
        if not (is_strict or everywhere) or type(each) is not type(default) or each != default:
            is_made_of_others = isinstance(each, Struct | list | tuple)
            written[name] = without_defaults(each, everywhere=everywhere) if is_made_of_others else each
    return written


@cache
def _shape(kind: type[Struct]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...], bool]:
    config = kind.__struct_config__
    fields = msgspec.structs.fields(kind)
    tag = {} if config.tag_field is None else {config.tag_field: config.tag}
    return tag, tuple((field.name, _default(field)) for field in fields), config.forbid_unknown_fields


def _default(field: msgspec.structs.FieldInfo) -> Any:
    made = field.default_factory
    return field.default if made is msgspec.NODEFAULT else made()
