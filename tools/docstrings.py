"""What docstrings say: of classes, of the fields of a class, and of functions, in the parts that the house writes."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct

PACKAGES = ("agent_sdk", "workspaces", "agent_server")
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^    (?P<names>[`\w*][^:\n]*): (?P<text>.*(?:\n        .*)*)", re.MULTILINE)


class Docstring(Struct, frozen=True):
    """A docstring in its parts."""

    text: str
    """What comes before the first section, as Markdown."""
    args: tuple[tuple[str, str], ...]
    """Names and what is said of them."""
    returns: str
    raises: tuple[tuple[str, str], ...]
    """Classes and what makes them happen."""


def said(thing: Any) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def docstring(thing: Any) -> Docstring:
    """Return the parts of a docstring, an inherited one where there is none."""
    parts = _SECTION.split(inspect.getdoc(thing) or "")
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return Docstring(
        parts[0].strip(),
        _entries(sections.get("Args", "")),
        _joined(sections.get("Returns", sections.get("Yields", ""))),
        _entries(sections.get("Raises", "")),
    )


def _entries(section: str) -> tuple[tuple[str, str], ...]:
    return tuple((found["names"], _joined(found["text"])) for found in _ENTRY.finditer(section))


def _joined(text: str) -> str:
    return " ".join(text.split())


def field_docs(cls: type) -> dict[str, str]:
    """Return what the strings below the fields of a class say, its bases' included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        ours = base.__module__.partition(".")[0] in PACKAGES
        source = sys.modules[base.__module__].__file__ if ours else None
        if source is not None:
            docs |= _docs_in(Path(source)).get(base.__name__, {})
    return docs


@cache
def _docs_in(source: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found.setdefault(node.name, {})[field.target.id] = _joined(text)
    return found
