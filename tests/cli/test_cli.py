"""agent-server itself: help, version, and what it costs to say so."""

import subprocess
import sys

import pytest

from agent_sdk import __version__
from agent_server.cli.main import explain, help_text

HEAVY = {"aiohttp", "apsw", "asyncio", "msgspec", "rich", "structlog"}
LIST_HEAVY = f"""
import sys
from agent_server.cli.main import main
try:
    main(["--help"])
finally:
    sys.stderr.write(" ".join({HEAVY!r} & set(sys.modules)))
"""


def test_help_needs_nothing_but_argparse():
    done = subprocess.run([sys.executable, "-c", LIST_HEAVY], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == help_text()


def test_the_version_is_that_of_the_package(shell):
    assert shell.run("--version").stdout.decode() == f"agent-server {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "run",
        "exec",
        "cp",
        "ls",
        "rm",
        "prune",
        "events",
        "attach",
        "doctor",
        "health",
        "config",
        "backup",
    ],
)
def test_every_command_explains_itself(shell, command):
    done = shell.run(command, "--help")
    assert done.stdout.decode().startswith(f"usage: agent-server {command} ")
    assert (done.stderr, done.returncode) == (b"", 0)


def test_a_bug_is_one_sentence_too():
    sentence, code = explain(ExceptionGroup("several", [KeyError("x")]))
    assert sentence == "unexpected KeyError: 'x'; this is a bug, agent-server --traceback … shows where"
    assert code == 1
