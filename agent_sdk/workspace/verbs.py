"""Verbs as methods of the protocol, the same at both ends: `files.mkdir` asks for Files.mkdir.

The params are the arguments by their names. Times are seconds here and whole milliseconds there (`timeout`,
`timeout_ms`), what returns nothing answers Done, and one param more says which process or shell is meant. A verb that
fits needs no code of its own at either end; what moves bytes or answers otherwise is written out, in `remote` and in
`service`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from agent_sdk.ids import op_id_or_new
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.methods.method import Effect, Method
from agent_sdk.protocol.methods.workspace import WORKSPACE
from agent_sdk.workspace.contract import Files, Git, Process, Shell, Workspace

PARTS: dict[str, type] = {
    "workspace": Workspace,
    "files": Files,
    "git": Git,
    "process": Process,
    "shell": Shell,
}
"""The contract of each part, by what the names of its methods begin with."""
KEYS = {"process": "process_id", "shell": "name"}
"""The param that says which one is meant, where a workspace has several."""


def verbs(part: str) -> dict[str, Callable[..., Any]]:
    """Return the verbs of a part by name, as its contract has them."""
    return {
        name: member
        for name, member in vars(PARTS[part]).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


@cache
def method_of(part: str, verb: str) -> type[Method[Any]] | None:
    """Return the method that is named after a verb and moves no bytes; None: there is none."""
    named = (method for method in WORKSPACE if method.method == f"{part}.{verb}")
    return next((method for method in named if not (method.takes or method.gives)), None)


def call_of(method: type[Method[Any]], arguments: Mapping[str, Any]) -> Method[Any]:
    """Return the call that asks for a verb with these arguments; what changes something gets an op_id."""
    params: dict[str, Any] = {}
    for name, value in arguments.items():
        if f"{name}_ms" in method.__struct_fields__:
            params[f"{name}_ms"] = milliseconds(name, value)
        else:
            params[name] = value
    if issubclass(method, Effect):
        params["op_id"] = op_id_or_new(params.get("op_id"))
    return method(**params)


def arguments_of(params: Method[Any]) -> dict[str, Any]:
    """Return the arguments of the verb that a call asks for."""
    part = params.method.partition(".")[0]
    fields = ((name, getattr(params, name)) for name in params.__struct_fields__)
    return {
        name.removesuffix("_ms"): seconds(value) if name.endswith("_ms") else value
        for name, value in fields
        if name not in ("op_id", KEYS.get(part))
    }


def milliseconds(field: str, seconds: float | None) -> int | None:
    """Convert seconds to the wire's milliseconds.

    Raises:
        InvalidParams: outside 0.001..86 400.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise InvalidParams(f"{field}: expected seconds, got {type(seconds).__name__}", field=field)
    if not 0.001 <= seconds <= 86_400:
        raise InvalidParams(f"{field} must be 0.001..86400 seconds (got {seconds!r})")
    return max(1, round(seconds * 1000))


def seconds(milliseconds: int | None) -> float | None:
    """Convert the wire's milliseconds to seconds."""
    return None if milliseconds is None else milliseconds / 1000
