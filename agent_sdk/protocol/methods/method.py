"""What every method is: a class whose fields are the params."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

from msgspec import Meta, Struct

from agent_sdk.protocol.arguments import Name, OpId

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
