"""What calls leave out: the fields that stand at their default, so that an older version, which refuses fields it does
not know, accepts all calls that need nothing new. A default therefore never changes its meaning."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import Struct


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
