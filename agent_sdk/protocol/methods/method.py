"""What every method is: a class whose fields are the params."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, TypeVar, get_args

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
    "UserName",
    "result_type",
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


class Method(Struct, Generic[R], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON-RPC method."""

    method: ClassVar[str]


class Effect(Method[R], frozen=True, kw_only=True):
    """A method that changes something: carried out once per op_id."""

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
