"""Every promise of docs/guarantees.md names the tests that hold it, and those tests exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
PROMISES = {
    heading.split()[0]: body
    for heading, body in re.findall(r"^## (G\d+ .+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}
WANTED = [f"G{number}" for number in range(1, 20)]


@cache
def functions_in(path):
    """Those that every run tries: not what is marked `elsewhere`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    waiting, found = [ast.parse((ROOT / path).read_text(encoding="utf-8"))], set()
    while waiting:
        node = waiting.pop()
        if "pytest.mark.elsewhere" not in map(ast.unparse, getattr(node, "decorator_list", ())):
            waiting += ast.iter_child_nodes(node)
            found |= {node.name} if isinstance(node, kinds) else set()
    return found


def named(body):
    return re.findall(r"^- `(?P<path>tests/\S+\.py)::(?P<test>test_\w+)`$", body, re.MULTILINE)


def test_every_guarantee_is_there():
    assert list(PROMISES) == WANTED


@pytest.mark.parametrize("promise", WANTED)
def test_a_promise_names_tests_and_they_exist(promise):
    listed = [line for line in PROMISES[promise].splitlines() if line.startswith("- ")]
    found = named(PROMISES[promise])
    assert found and len(found) == len(listed)
    assert [f"{path}::{test}" for path, test in found if test not in functions_in(path)] == []
