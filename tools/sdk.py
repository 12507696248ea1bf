"""docs/sdk.md: every public class and function of agent_sdk and workspaces, from signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, cast

import msgspec

import agent_sdk
import workspaces
from agent_sdk.conversation import contract as conversation
from agent_sdk.protocol import checks, errors, events
from agent_sdk.workspace import contract
from tools.docstrings import PACKAGES, Docstring, docstring, field_docs, said
from tools.markdown import link, table

INTRODUCTION = """\
Printed by `make docs` from the code; do not edit. The [README](../README.md) and the [examples](../examples) are the
way in; this is where to look something up.

Everything is async. `agent_sdk.sync` and `workspaces.sync` hold the same classes, blocking: the same names, arguments,
results and errors. There `async with` is `with`, an async iterator a plain one, and a workspace has three more names:
`execute_command`, `file_upload` and `file_download`, which are `execute`, `upload` and `download`.
"""

PARTS: dict[str, tuple[str, ...]] = {
    "Agents and models": ("Agent", "LLM", "ScriptedLLM", "ConfirmationPolicy", "tool"),
    "Conversations": (
        "Conversation",
        "A conversation",
        "Accepted",
        "Outcome",
        "Snapshot",
        "Stats",
        "Cursor",
        "AgentServer",
    ),
    "Workspaces": (
        "Workspace",
        "LocalWorkspace",
        "RemoteWorkspace",
        "DockerWorkspace",
        "APIRemoteWorkspace",
        "Sandbox",
    ),
    "In a workspace": ("Files", "Git", "Process", "Shell", "ExecResult", "Exit", "FileInfo", "Transferred"),
}
"""What belongs together; whatever else is public comes after it."""
INNER = {"add_environment", "attached", "become", "link", "on_close", "over", "target", "untouched_link"}
"""What conversations and servers use of a workspace."""
NOT_CLASSES = ("__version__", "errors", "events", "Event", "Delta")


def public() -> dict[str, Any]:
    """Return what users import from the two packages, and what they get from that, by name."""
    found = {name: getattr(package, name) for package in (agent_sdk, workspaces) for name in package.__all__}
    found |= {
        "A conversation": conversation.Conversation,
        "Files": contract.Files,
        "Git": contract.Git,
        "Shell": contract.Shell,
    }
    return {name: thing for name, thing in found.items() if name not in NOT_CLASSES}


def sdk() -> str:
    """Return the page."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield "# The Python SDK\n"
    yield INTRODUCTION
    things = public()
    shown = {name for names in PARTS.values() for name in names}
    rest = tuple(name for name in things if name not in shown)
    for part, names in (*PARTS.items(), *([("More", rest)] if rest else [])):
        yield f"## {part}\n"
        for name in names:
            yield from _thing(name, things[name])
    yield "## Tests without a model\n"
    yield f"From `agent_sdk.testing`. {said(import_module('agent_sdk.testing'))}\n"
    for name, thing in vars(import_module("agent_sdk.testing")).items():
        if inspect.isfunction(thing) and thing.__module__ == "agent_sdk.testing" and not name.startswith("_"):
            yield f"### testing.{name}\n"
            yield from _callable(name, thing)
    yield from _events()
    yield from _errors()


def _thing(name: str, thing: Any) -> Iterator[str]:
    yield f"### {name}\n"
    if not inspect.isclass(thing):
        yield from _callable(name, thing)
        return
    if issubclass(thing, msgspec.Struct):
        yield _signature(name, thing)
        yield from _said(docstring(thing))
    else:
        constructor = vars(thing).get("__init__")
        if constructor is not None:
            yield _signature(name, constructor)
        yield from _said(docstring(thing))
        if constructor is not None and constructor.__doc__:
            yield from _said(docstring(constructor))
    if docs := _attributes(thing):
        yield from table("attribute | ", *((f"`{attribute}`", text) for attribute, text in docs.items()))
    above = [other for other in public().values() if inspect.isclass(other) and other in thing.__mro__[1:]]
    if above:
        yield f"Everything else is as in {' and '.join(link(cls.__name__) for cls in above)}.\n"
    for member, how in _members(thing):
        if any(inspect.getdoc(how) == inspect.getdoc(getattr(cls, member, None)) for cls in above):
            continue
        yield f"#### {name.removeprefix('A ')}.{member}\n"
        yield from _callable(member, how)


def _callable(name: str, function: Any) -> Iterator[str]:
    if isinstance(function, property):
        yield from _said(docstring(function))
        return
    yield _signature(name, function)
    yield from _said(docstring(function))


def _said(text: Docstring) -> Iterator[str]:
    if text.text:
        yield f"{text.text}\n"
    if text.args:
        yield from table("argument | ", *((f"`{name}`", what) for name, what in text.args))
    if text.returns:
        yield f"Returns: {text.returns}\n"
    if text.raises:
        yield from table("raises | ", *((f"`{name}`", what) for name, what in text.raises))


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    source = _source(function)
    arguments, kinds = [], inspect.Parameter
    before: Any = None
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if before is kinds.POSITIONAL_ONLY and parameter.kind is not before:
            arguments.append("/")
        if parameter.kind is kinds.KEYWORD_ONLY and before not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            arguments.append("*")
        before = parameter.kind
        arguments.append(_argument(parameter, source.get(parameter.name, ""), function))
    result = source.get("return", "None")
    text = f"({', '.join(arguments)})" + ("" if result == "None" else f" -> {_plain(result, function)}")
    if len(name) + len(text) > 100:
        text = text.replace(", ".join(arguments), "\n    " + ",\n    ".join(arguments) + ",\n")
    prefix = "async " if inspect.iscoroutinefunction(inspect.unwrap(function)) else ""
    return f"```python\n{prefix}{name}{text}\n```\n"


def _source(function: Callable[..., Any]) -> dict[str, str]:
    """The annotations as they are written."""
    classes = reversed(function.__mro__) if inspect.isclass(function) else [inspect.unwrap(function)]
    found = {name: text for cls in classes for name, text in getattr(cls, "__annotations__", {}).items()}
    return {
        name: text if isinstance(text, str) else inspect.formatannotation(text)
        for name, text in found.items()
    }


def _argument(parameter: inspect.Parameter, annotation: str, function: Callable[..., Any]) -> str:
    kinds = inspect.Parameter
    stars = (
        "*" if parameter.kind is kinds.VAR_POSITIONAL else "**" if parameter.kind is kinds.VAR_KEYWORD else ""
    )
    default = parameter.default
    if str(default) == "<factory>":
        of_struct = msgspec.structs.fields(cast(type[msgspec.Struct], function))
        default = next(field.default_factory() for field in of_struct if field.name == parameter.name)
    given = "" if default is kinds.empty else f" = {_value(default)}"
    return f"{stars}{parameter.name}: {_plain(annotation, function)}{given}"


def _value(default: Any) -> str:
    return "…" if isinstance(default, msgspec.Struct) else repr(default)


def _plain(annotation: str, function: Callable[..., Any]) -> str:
    """A type without what it is held to, and without the names that only our code has for that."""
    places = function.__mro__[:-1] if inspect.isclass(function) else [function]
    modules = [vars(checks), *(vars(sys.modules[place.__module__]) for place in reversed(places))]
    known = {name: thing for module in modules for name, thing in module.items()}

    def base(found: re.Match[str]) -> str:
        origin = getattr(known.get(found[0]), "__origin__", None)
        held = hasattr(known.get(found[0]), "__metadata__") and inspect.isclass(origin)
        return str(getattr(origin, "__name__", "")) if held else found[0]

    text = re.sub(r"Annotated\[(\w+), Meta\([^()]*\)\]", r"\1", annotation)
    return re.sub(r"\b[A-Z]\w*", base, text)


def _attributes(cls: type) -> dict[str, str]:
    return {name: text for name, text in field_docs(cls).items() if not name.startswith("_")}


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties, inherited ones after a class's own, each once."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in PACKAGES:
            continue
        for name, member in vars(base).items():
            if name.startswith("_") or name in seen or name in INNER:
                continue
            seen.add(name)
            if isinstance(member, (classmethod, staticmethod)):
                member = getattr(cls, name)
            if isinstance(member, property) or inspect.isroutine(member):
                yield name, _documented(cls, name, member)


def _documented(cls: type, name: str, member: Any) -> Any:
    """The member, or what it overrides where it says nothing itself."""
    if member.__doc__:
        return member
    texts = (vars(base).get(name) for base in cls.__mro__)
    return next((text for text in texts if getattr(text, "__doc__", None)), member)


def _events() -> Iterator[str]:
    yield "## Events\n"
    yield f"`agent_sdk.events`. {said(events.Base)} Callbacks and `Conversation.events` get them; their fields are in"
    yield "[protocol.md](protocol.md#kinds-of-events), with those of the deltas.\n"
    yield from table(
        "class | ",
        *((f"[`{cls.__name__}`](protocol.md#{tag})", said(cls)) for tag, cls in events.kinds().items()),
    )


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield "`agent_sdk.errors`. The same class is raised here and there; many are built-in exceptions, too.\n"
    yield from table(
        "class | a kind of | ",
        *(
            (f"`{name}`", ", ".join(f"`{base.__name__}`" for base in cls.__bases__), said(cls))
            for name, cls in vars(errors).items()
            if inspect.isclass(cls) and issubclass(cls, errors.AgentServerError)
        ),
    )
