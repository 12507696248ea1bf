"""docs/add_a_verb.md, followed to the letter: a verb is there in all its forms after the edits that the page counts."""

import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agent_sdk.remote.files import RemoteFiles, RemoteGit
from agent_sdk.remote.link import Part
from agent_sdk.remote.process import RemoteProcess, RemoteShell
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.workspace.contract import Shell
from agent_sdk.workspace.verbs import PARTS
from tests.conftest import serving

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/add_a_verb.md").read_text(encoding="utf-8")
EDIT = re.compile(
    r"^In `(\S+)`, before `([^`\n]+)`:\n\n```(?:python|text)\n(.*?)```$", re.DOTALL | re.MULTILINE
)
EDITS = EDIT.findall(PAGE)
MOST_EDITS, MOST_FILES = 5, 4

HERE_THERE_AND_BLOCKING = """
import asyncio, inspect, os, stat, sys
import agent_sdk
from agent_sdk import LocalWorkspace, RemoteWorkspace, sync
from agent_sdk.protocol.errors import InvalidParams, PathNotFound
from agent_sdk.remote.files import RemoteFiles
from agent_sdk.workspace.contract import Files

copy, folder, url, key = sys.argv[1:]
assert agent_sdk.__file__.startswith(copy), agent_sdk.__file__

async def try_out(workspace):
    await workspace.files.write("run.sh", b"exit 0\\n")
    assert await workspace.files.chmod("run.sh", 0o750) is None
    assert (await workspace.files.stat("run.sh")).mode == 0o750
    for path, mode, error in (("run.sh", 0o1777, InvalidParams), ("none.sh", 0o700, PathNotFound)):
        try:
            await workspace.files.chmod(path, mode=mode)
        except error:
            continue
        raise AssertionError(path)

async def main():
    async with LocalWorkspace(folder) as workspace:
        await try_out(workspace)
    async with RemoteWorkspace(url, key) as workspace:
        await try_out(workspace)

asyncio.run(main())
with sync.RemoteWorkspace(url, key) as workspace:
    workspace.files.write("run.sh", b"exit 0\\n")
    assert workspace.files.chmod("run.sh", mode=0o700) is None
    assert workspace.files.stat("run.sh").mode == 0o700
for form in (RemoteFiles.chmod, sync.Files.chmod):
    assert inspect.signature(form) == inspect.signature(Files.chmod)
    assert inspect.getdoc(form) == inspect.getdoc(Files.chmod)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The packages with the page's edits."""
    folder = tmp_path_factory.mktemp("packages")
    for package in ("agent_sdk", "workspaces", "agent_server", "tools"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, before, code in EDITS:
        path = folder / file
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        places = [at for at, line in enumerate(lines) if line.strip().startswith(before)]
        assert len(places) == 1, (file, before)
        followed = lines[places[0]]
        indent = followed[: len(followed) - len(followed.lstrip())]
        lines.insert(places[0], textwrap.indent(code, indent))
        path.write_text("".join(lines), encoding="utf-8")
    return folder


def test_the_page_counts_its_edits_and_they_are_few():
    files = {file for file, _, _ in EDITS}
    assert f"**{len(EDITS)} edits in {len(files)} files**" in PAGE
    assert PAGE.count("```") == 2 * len(EDITS)  # each block is one of them
    assert len(EDITS) <= MOST_EDITS
    assert len(files) <= MOST_FILES


def test_the_verb_works_here_over_a_server_and_blocking(copy, tmp_path):
    script = tmp_path / "try.py"
    script.write_text(HERE_THERE_AND_BLOCKING)
    (tmp_path / "here").mkdir()
    first = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    with serving(tmp_path / "server", **first) as server:
        command = [sys.executable, script, copy, tmp_path / "here", server.url, server.api_key]
        done = subprocess.run(command, env=first, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_verb_is_in_the_references_of_the_protocol(copy):
    subprocess.run([sys.executable, "-m", "tools.documents"], cwd=copy, check=True, timeout=60)
    printed = (copy / "docs/protocol.md").read_text(encoding="utf-8")
    assert "### `files.chmod`\n\nSet the permission bits of a file or folder." in printed
    assert '"name": "files.chmod"' in (copy / "agent_server/openrpc.json").read_text(encoding="utf-8")


def test_a_verb_that_nobody_has_written_and_no_method_says_is_noticed_when_its_class_is_made():
    with pytest.raises(
        TypeError, match=r"Half\.run is not written, and no method shell\.run says it without bytes"
    ):

        class Half(Part, Shell, part="shell"):
            pass


@pytest.mark.parametrize("form", [RemoteFiles, RemoteGit, RemoteProcess, RemoteShell, RemoteWorkspace])
def test_what_is_made_there_looks_like_the_contract(form):
    contract = next(base for base in form.__mro__ if base in PARTS.values())
    verbs = {name: verb for name, verb in vars(form).items() if inspect.isfunction(verb)}
    made = [name for name, verb in verbs.items() if inspect.unwrap(verb) is vars(contract).get(name)]
    assert made
    for name in made:
        assert inspect.signature(getattr(form, name)) == inspect.signature(getattr(contract, name))
        assert inspect.getdoc(getattr(form, name)) == inspect.getdoc(getattr(contract, name))
