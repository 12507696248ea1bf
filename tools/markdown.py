"""Markdown: tables of fields, names of types, links."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from tools.docstrings import field_docs


def link(name: str) -> str:
    """Return a link to the heading of this name on the same page."""
    return f"[{name}](#{name.lower()})"


def cell(text: str) -> str:
    """Return a text as a table can hold it."""
    return text.replace("|", "\\|")


def table(head: str, *rows: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a table.

    Args:
        head: the headings, with `|` between them.
        rows: the cells of each row.
    """
    yield f"| {head} |".replace("|  |", "| |")
    yield f"|{' --- |' * (head.count('|') + 1)}"
    yield from (f"| {' | '.join(cell(text) for text in row)} |" for row in rows)
    yield ""


def fields(cls: type, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the table of the fields of a struct."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    shown = [field for field in info.fields if field.name not in leave_out]
    if not shown:
        yield "No fields.\n"
        return
    docs = field_docs(cls)
    yield from table(
        "field | type | default | ",
        *(
            (f"`{field.encode_name}`", _type(field.type), _default(field), docs.get(field.name, ""))
            for field in shown
        ),
    )


def _default(field: inspect.Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{json.dumps(field.default_factory())}`"
    if isinstance(field.default, msgspec.Struct):
        return "its defaults"
    return f"`{msgspec.json.encode(field.default).decode()}`"


def _type(info: Any) -> str:
    match info:
        case inspect.Metadata():
            return _type(info.type)
        case inspect.StructType():
            return link(info.cls.__name__)
        case inspect.UnionType():
            return " or ".join(_type(inner) for inner in info.types)
        case inspect.LiteralType():
            return " or ".join(f"`{json.dumps(value)}`" for value in info.values)
        case inspect.ListType() | inspect.VarTupleType():
            return f"list of {_type(info.item_type)}{_bounds(info.min_length, info.max_length, 'entries')}"
        case inspect.DictType():
            return f"map of {_type(info.value_type)}{_bounds(info.min_length, info.max_length, 'entries')}"
        case inspect.StrType():
            pattern = f" matching `{info.pattern}`" if info.pattern else ""
            return f"string{_bounds(info.min_length, info.max_length, 'characters')}{pattern}"
        case inspect.IntType():
            return f"integer{_bounds(info.ge, info.le, '')}"
        case inspect.FloatType():
            more = f" > {info.gt:g}" if info.gt is not None else ""
            return f"number{more}"
        case inspect.BoolType():
            return "boolean"
        case inspect.NoneType():
            return "null"
    return "any JSON"


def _bounds(low: int | None, high: int | None, unit: str) -> str:
    if low is None and high is None:
        return ""
    return f", {'' if low is None else low}..{'' if high is None else high} {unit}".rstrip()
