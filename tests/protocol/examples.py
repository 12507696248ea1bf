"""Values of message classes: one example for the golden files, all of them for property tests."""

import re
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import Raw, inspect

from agent_sdk.protocol.checks import flaw

STRINGS = ("text", "INT", "018f0000-0000-7000-8000-000000000001", "linux/amd64", "/data", "/host:/in:ro")

WRITTEN: dict[str, dict[str, str]] = {
    "LLM": {"base_url": "https://host/v1"},
    "Sandbox": {"memory": "256m", "disk": "10g", "tmp": "1g"},
}
"""Fields whose text has a form of its own, by class."""


def example(info: inspect.Type | type) -> Any:
    """One value with every field set."""
    match info:
        case type():
            return example(inspect.type_info(info))
        case inspect.Metadata():
            return example(info.type)
        case inspect.StructType():
            written = WRITTEN.get(info.cls.__name__, {})
            return info.cls(**{f.name: written.get(f.name) or _beside(f) for f in info.fields})
        case inspect.UnionType():
            return example(info.types[0])
        case inspect.LiteralType():
            return info.values[0]
        case inspect.ListType():
            return [example(info.item_type)]
        case inspect.VarTupleType():
            return (example(info.item_type),)
        case inspect.DictType():
            return {"key": example(info.value_type)}
        case inspect.StrType():
            return next(text for text in STRINGS if info.pattern is None or re.search(info.pattern, text))
        case inspect.IntType():
            return min(max(7, info.ge or 0), info.le or 2**53)
        case inspect.FloatType():
            return 1.5
        case inspect.BoolType():
            return True
        case inspect.RawType():
            return Raw(b'{"type":"turn_started","seq":1,"at":1.5,"run_id":"text"}')
        case inspect.AnyType():
            return {"any": ["json", 1]}
    raise TypeError(f"no example of {info}")


def _beside(field: inspect.Field) -> Any:
    """An example that is not the default of the field, which a call would leave out."""
    found = example(field.type)
    if found is not True and found != field.default:
        return found
    if isinstance(field.type, inspect.LiteralType):
        return field.type.values[-1]
    return field.default is not True


def values(info: inspect.Type | type) -> st.SearchStrategy[Any]:
    """Every value a field or class can have."""
    match info:
        case type():
            return values(inspect.type_info(info))
        case inspect.Metadata():
            return values(info.type)
        case inspect.StructType():
            written = WRITTEN.get(info.cls.__name__, {})
            given = {f.name: st.just(written[f.name]) for f in info.fields if f.name in written}
            return st.builds(info.cls, **{f.name: values(f.type) for f in info.fields} | given)
        case inspect.UnionType():
            return st.one_of([values(inner) for inner in info.types])
        case inspect.LiteralType():
            return st.sampled_from(info.values)
        case inspect.ListType():
            return st.lists(values(info.item_type), min_size=info.min_length or 0, max_size=3)
        case inspect.VarTupleType():
            return st.lists(values(info.item_type), max_size=3).map(tuple)
        case inspect.DictType():
            made = st.dictionaries(values(info.key_type), values(info.value_type), max_size=3)
            return made.filter(lambda found: not flaw(found, for_system=True))  # it may be an environment
        case inspect.StrType():
            return _texts(info)
        case inspect.IntType():
            return st.integers(
                -(2**53) if info.ge is None else info.ge, 2**53 if info.le is None else info.le
            )
        case inspect.FloatType():
            if info.gt is None and info.ge is None:
                return st.floats(allow_nan=False, allow_infinity=False)
            return st.floats(0.1 if info.ge is None else info.ge, 1e9 if info.le is None else info.le)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.RawType():
            return JSON.map(lambda value: Raw(msgspec.json.encode(value)))
        case inspect.AnyType():
            return JSON
    raise TypeError(f"no values of {info}")


def _texts(info: inspect.StrType) -> st.SearchStrategy[str]:
    most = min(info.max_length or 50, 50)
    if info.pattern is None:
        return st.text(min_size=info.min_length or 0, max_size=most)
    return st.from_regex(info.pattern, fullmatch=True).filter(lambda text: len(text) <= most)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
