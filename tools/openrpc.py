"""The protocol as an OpenRPC 1.3 document, made from the message classes."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import cleandoc
from typing import Any, get_args

import msgspec

from agent_sdk.protocol import events
from agent_sdk.protocol.errors import AgentServerError, table
from agent_sdk.protocol.methods import GROUPS, NOTICES
from agent_sdk.protocol.methods.method import Method, result_type
from agent_sdk.protocol.specs import PROTOCOL_VERSION
from tools.docstrings import field_docs, said

Json = dict[str, Any]

SUMMARIES = {
    "connection": "Answered by both ends, `initialize` by the accepting one.",
    "workspace": "Answered by a box, and by a server on behalf of its box.",
    "sandbox": "Answered by a server about the container of a workspace.",
    "box": "Answered by a box about itself.",
    "conversation": "Answered by a server.",
    "client": "Answered by a client: the server calls them over the same connection.",
}
_REF = "#/components/schemas/{name}"


def openrpc() -> Json:
    """The OpenRPC document."""
    methods = [(group, method) for group, members in GROUPS.items() for method in members]
    kinds = events.kinds()
    types: list[Any] = [method for _, method in methods]
    types += [result_type(method) for _, method in methods]
    types += [*NOTICES, *kinds.values(), events.Delta]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    for cls in structs_in(types):
        _describe(components.get(cls.__name__), cls)
    results = schemas[len(methods) :]
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "agentrpc",
            "version": f"{PROTOCOL_VERSION}.0.0",
            "description": "JSON-RPC 2.0 over WebSocket, both ways. docs/protocol.md says what JSON cannot.",
        },
        "methods": [
            _method(group, method, schema, result, components)
            for (group, method), schema, result in zip(methods, schemas, results, strict=False)
        ],
        "x-notices": [
            {"name": notice.method, "summary": said(notice), "params": schema}
            for notice, schema in zip(NOTICES, schemas[2 * len(methods) :], strict=False)
        ],
        "x-events": {"oneOf": [{"$ref": _REF.format(name=cls.__name__)} for cls in kinds.values()]},
        "components": {
            "schemas": components,
            "errors": {cls.__name__: _error(cls) for cls in table()},
        },
    }


def structs_in(types: Iterable[Any]) -> list[type[msgspec.Struct]]:
    """Every struct class that the types are made of, in order of appearance."""
    found: dict[type[msgspec.Struct], None] = {}
    for info in msgspec.inspect.multi_type_info(list(types)):
        _collect(info, found)
    return list(found)


def _collect(info: Any, found: dict[type[msgspec.Struct], None]) -> None:
    if isinstance(info, msgspec.inspect.StructType):
        if info.cls not in found:
            found[info.cls] = None
            for field in info.fields:
                _collect(field.type, found)
        return
    for name in ("item_type", "key_type", "value_type", "type"):
        if (inner := getattr(info, name, None)) is not None:
            _collect(inner, found)
    for inner in [*getattr(info, "types", ()), *getattr(info, "item_types", ())]:
        _collect(inner, found)


def _describe(schema: Json | None, cls: type) -> None:
    if schema is None:
        return
    schema["description"] = cleandoc(cls.__doc__ or "")  # Python 3.13 does that itself, older ones do not
    for name, text in field_docs(cls).items():
        if name in schema.get("properties", {}):
            schema["properties"][name].setdefault("description", text)


def _method(group: str, method: type[Method[Any]], schema: Json, result: Json, components: Json) -> Json:
    own = components[schema["$ref"].rsplit("/", 1)[1]]
    required = own.get("required", [])
    return {
        "name": method.method,
        "summary": said(method),
        "tags": [{"name": group}],
        "paramStructure": "by-name",
        "params": [
            {"name": name, "required": name in required, "schema": property}
            for name, property in own.get("properties", {}).items()
        ],
        "result": {"name": result_name(method), "schema": result},
    }


def result_name(method: type[Method[Any]]) -> str:
    """What the result is called: the class, or `list of` it."""
    result = result_type(method)
    inner = get_args(result)
    return f"list of {inner[0].__name__}" if inner else result.__name__


def _error(cls: type[AgentServerError]) -> Json:
    return {
        "code": cls.code,
        "message": said(cls),
        "data": {"kind": cls.kind, "retryable": cls.retryable},
    }
