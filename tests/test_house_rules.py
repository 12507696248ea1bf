"""The rules of the house that no linter knows: where things stand, how large they grow, what nobody calls."""

import ast
import asyncio
import builtins
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import aiodocker
import pytest
from msgspec import to_builtins

from bench.house import LARGEST, LONGEST

ROOT = Path(__file__).parent.parent
PACKAGES = ("agent_sdk", "workspaces", "agent_server")

FILE_LINES = 500
SHORT = 50
SHORT_FOLDERS = {
    "agent_sdk/agent/middleware/": "a feature of the agent is a file",
}
SHORT_FILES = {
    "agent_sdk/log/chain.py": "rows, recovery and what is saved are proved by it",
    "agent_sdk/version.py": "setup.cfg reads it",
    "agent_server/metrics.py": "all rooms of the server count in it",
    "workspaces/backend/labels.py": "all backends find again by them",
    "workspaces/sync.py": "what users import",
}
FUNCTION_LINES = 60
NAMES_OF_NOTHING = {"utils", "util", "helpers", "helper", "common", "base", "core", "impl", "manager", "misc"}
NOUNS_ARE_MISSING = {
    *("It", "They", "This", "That", "These", "Those", "He", "She", "We", "You", "I", "Its", "Their", "So"),
    *("Somebody", "Someone", "Nobody", "Whoever", "There", "Here", "Now", "One's"),
}
READS_THE_ENVIRONMENT = {
    "agent_server/config/options.py",
    "agent_sdk/definition.py",  # LLM.from_env
    "agent_sdk/workspace/environment.py",  # what a child process inherits
}

IN_A_DATA_FOLDER = {"disks/", "snapshots/"}

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def functions(path: Path) -> Iterator[Function]:
    return (node for node in nodes(path) if isinstance(node, Function))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in nodes(path) if isinstance(node, ast.Call))


def dotted(node: ast.AST) -> str:
    """`os.environ.get` for the expression that spells it, with `?` for what has no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def mentions(path: Path, names: set[str]) -> Iterator[int]:
    """The lines that import or spell out one of the dotted names."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Attribute):
            found = {dotted(node)}
        else:
            continue
        if found & names:
            yield node.lineno


def length_without_docstring(function: Function) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def uses_a_shell(call: ast.Call) -> bool:
    if dotted(call.func) in {"os.system", "os.popen", "asyncio.create_subprocess_shell"}:
        return True
    return any(
        word.arg == "shell" and not (isinstance(word.value, ast.Constant) and word.value.value is False)
        for word in call.keywords
    )


def refuse(find: Callable[[Path], Iterable[object]], files: list[Path] = FILES) -> None:
    """Fails with everything `find` finds in the files: lines, or a sentence each."""
    offences = [f"{place(path)}: {found}" for path in files for found in find(path)]
    if offences:
        pytest.fail("\n".join(offences), pytrace=False)


def test_the_three_packages_are_looked_at():
    assert {place(path).split("/")[0] for path in FILES} == set(PACKAGES)


def test_a_short_file_has_a_reason():
    short = {
        place(path)
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py")
        and not place(path).startswith(tuple(SHORT_FOLDERS))
        and len(path.read_text(encoding="utf-8").splitlines()) < SHORT
    }
    assert short == SHORT_FILES.keys()


def test_no_file_goes_through_its_wall():
    def too_long(path: Path) -> Iterator[str]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            yield f"{lines} lines: which noun is missing?"

    refuse(too_long)


def test_every_function_fits_on_a_screen():
    def long(path: Path) -> Iterator[str]:
        lengths = ((function.name, length_without_docstring(function)) for function in functions(path))
        return (f"{name} has {lines} lines" for name, lines in lengths if lines > FUNCTION_LINES)

    refuse(long)


def test_files_are_named_after_things():
    def empty_words(path: Path) -> Iterator[str]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        return (part for part in parts if part.strip("_") in NAMES_OF_NOTHING)

    refuse(empty_words)


def test_nothing_counts_on_garbage_collection():
    refuse(lambda path: (f.lineno for f in functions(path) if f.name == "__del__"))


def test_the_environment_is_read_in_three_files():
    names = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}
    elsewhere = [path for path in FILES if place(path) not in READS_THE_ENVIRONMENT]
    refuse(lambda path: mentions(path, names), elsewhere)


def test_no_archive_is_unpacked_wholesale():
    wholesale = {"extractall", "unpack_archive"}
    refuse(lambda path: (c.lineno for c in calls(path) if dotted(c.func).split(".")[-1] in wholesale))


def test_no_command_is_given_to_an_implicit_shell():
    refuse(lambda path: (call.lineno for call in calls(path) if uses_a_shell(call)))


def test_only_the_server_serves_http():
    elsewhere = [path for path in FILES if not place(path).startswith("agent_server/")]
    refuse(lambda path: mentions(path, {"aiohttp.web"}), elsewhere)


def test_nothing_private_of_aiodocker_is_used():
    folder = Path(aiodocker.__file__).parent
    private = {
        name
        for path in folder.glob("*.py")
        for node in nodes(path)
        for name in [node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", "")]
        if isinstance(name, str) and re.match("_[a-z]", name)
    } | {path.stem for path in folder.glob("_[a-z]*.py")}

    def used(path: Path) -> Iterator[str]:
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr in private and dotted(node.value) != "self":
                yield f"{node.lineno}: {node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiodocker"):
                yield from (f"{node.lineno}: {name.name}" for name in node.names if name.name in private)

    refuse(used, sorted((ROOT / "workspaces/backend/docker").rglob("*.py")))


def test_each_folder_says_what_its_files_are_for():
    def unsaid(front: Path) -> Iterator[str]:
        text = front.read_text(encoding="utf-8") if front.exists() else ""
        said = ast.get_docstring(ast.parse(text)) or ""
        here = {path.stem for path in front.parent.glob("*.py")} - {"__init__"}
        here |= {path.parent.name for path in front.parent.glob("*/*.py")}
        return (f"does not name {name}" for name in sorted(here) if not re.search(rf"\b{name}\b", said))

    refuse(unsaid, sorted({path.with_name("__init__.py") for path in FILES}))


def test_everything_public_says_what_it_is_for_or_inherits_a_text_that_does():
    def undescribed(path: Path) -> Iterator[str]:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", "") != module.__name__:
                continue
            if not inspect.getdoc(thing):
                yield name
            members = [n for n in vars(thing) if not n.startswith("_")] if inspect.isclass(thing) else []
            for member in members:
                kind = inspect.getattr_static(thing, member)
                is_called = inspect.isroutine(kind) or isinstance(kind, property)
                if is_called and not inspect.getdoc(getattr(thing, member)):
                    yield f"{name}.{member}"

    refuse(undescribed, [path for path in FILES if path.stem not in {"__init__", "__main__"}])


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Where a docstring of something public stands, and its text."""
    for node in nodes(path):
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield f"{node.lineno}: {node.name}", ast.get_docstring(node) or ""


def test_no_docstring_sends_its_reader_elsewhere():
    def sent(path: Path) -> Iterator[str]:
        return (where for where, text in docstrings(path) if re.search(r"(^|[.;:(,])\s*[Ss]ee\b", text))

    refuse(sent)


def test_an_error_that_a_docstring_promises_is_one():
    known = {node.name for path in FILES for node in nodes(path) if isinstance(node, ast.ClassDef)}
    known |= {*vars(builtins), *vars(asyncio)}

    def made_up(path: Path) -> Iterator[str]:
        imported = {
            name.asname or name.name
            for node in nodes(path)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }
        for where, text in docstrings(path):
            _, _, errors = text.partition("Raises:\n")
            for line in re.findall(r"^    ([A-Z][\w.]*(?:, [\w.…]+)*):", errors, re.MULTILINE):
                promised = {name.rpartition(".")[2] for name in line.split(", ")} - {"…"}
                yield from (f"{where} raises {name}" for name in promised - known - imported)

    refuse(made_up)


def test_a_docstring_begins_with_what_is_done_or_with_the_thing_itself():
    """With an imperative verb or a noun: not with a pronoun whose noun is missing, nor with what somebody else does."""
    verbs = {text.split()[0].strip(".,;:") for path in FILES for _, text in docstrings(path) if text}

    def begins_otherwise(path: Path) -> Iterator[str]:
        called = {f"{f.lineno}: {f.name}" for f in functions(path)}
        for where, text in docstrings(path):
            first = (text.split() or [""])[0].strip(".,;:")
            told = where in called and first.endswith("s") and first[:-1] in verbs
            if first in NOUNS_ARE_MISSING or told:
                yield f"{where} begins with {first}"

    refuse(begins_otherwise)


def test_the_name_of_a_test_is_a_sentence():
    def labels(path: Path) -> Iterator[str]:
        names = (f.name for f in functions(path) if f.name.startswith("test_"))
        return (name for name in names if len(name.split("_")) < 4)

    refuse(labels, TEST_FILES)


def test_no_test_replaces_the_code_it_tests():
    """A fixture that patches code is a mock by another name; setting the environment or the folder is not."""
    patches = {f"monkeypatch.{verb}{kind}" for verb in ("set", "del") for kind in ("attr", "item")}
    refuse(lambda path: (c.lineno for c in calls(path) if dotted(c.func) in patches), TEST_FILES)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=place)
def test_every_file_that_a_page_names_is_there(page):
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_0-9]+\.py)?)`", page.read_text(encoding="utf-8")))
    assert page.stem != "architecture" or len(named) > 50
    places = [ROOT, ROOT / "agent_sdk", ROOT / "agent_server"]
    gone = [name for name in sorted(named) if not any((place / name).exists() for place in places)]
    assert set(gone) <= IN_A_DATA_FOLDER


def test_the_house_and_the_ways_through_it_grow_no_further():
    told = subprocess.run([sys.executable, "-m", "bench.house", "--json"], cwd=ROOT, capture_output=True)
    assert told.returncode == 0, told.stderr.decode()
    stands = json.loads(told.stdout)
    allowed = to_builtins({"house": LARGEST, **LONGEST})
    assert {
        f"{name}: {value} {what}, at most {allowed[name][what]}: what does the new thing replace?"
        for name, measured in stands.items()
        for what, value in measured.items()
        if value > allowed[name][what]
    } == set()
