"""The README is true: its code is that of the examples, its commands exist, its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from agent_server.cli.main import help_text, parse
from agent_server.config.options import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- (?P<file>\S+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
BLOCKS = [found.groupdict() for found in BLOCK.finditer(README)]
SHELL = [
    line.strip()
    for block in BLOCKS
    if block["language"] == "sh"
    for line in block["text"].splitlines()
    if line.strip()
]


def of(language):
    return [block for block in BLOCKS if block["language"] == language]


def undented(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_first_commands_are_the_demo_and_the_tests():
    assert [line.split("#")[0].split() for line in SHELL[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("block", of("python"), ids=lambda block: block["file"] or "unnamed")
def test_code_is_taken_from_the_example_it_names(block):
    example = undented((ROOT / block["file"]).read_text(encoding="utf-8"))
    shown = undented(block["text"])
    assert shown
    assert any(example[at : at + len(shown)] == shown for at in range(len(example)))


def test_every_example_is_shown():
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").glob("[0-9]*.py")}
    assert {block["file"] for block in of("python")} == examples


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("agent-server")])
def test_every_command_line_is_understood(line):
    words = shlex.split(line, comments=True)
    assert parse(words[1:]).command == words[1]


def test_the_table_lists_every_command():
    rows = re.findall(r"^\| `agent-server (\w+)", README, re.MULTILINE)
    listed = re.findall(r"^    (\w+) ", help_text(), re.MULTILINE)
    assert rows == listed


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_configuration_is_accepted(tmp_path):
    (block,) = of("toml")
    file = tmp_path / "agent-server.toml"
    file.write_text(block["text"])
    assert load(file, environ={}).allow_hosts == ("agents.example",)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("says", ["Python 3.10.13", "Python 2.7.18"])
def test_a_python_that_is_too_old_is_told_in_one_sentence_and_nothing_is_begun(tmp_path, says):
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {says}; exit 1\n')
    old.chmod(0o755)
    command = ["make", "--no-print-directory", "venv", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"Python 3.11 or newer is needed; {old} --version says: {says}; name another"
    )
    assert (done.stdout, (tmp_path / "venv").exists()) == ("", False)
