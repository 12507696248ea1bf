"""The examples run, and say what the documents say of them."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, **environ):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def there(server):
    return {"AGENT_SERVER_URL": server.url, "AGENT_SERVER_API_KEY": server.api_key}


def test_here_and_there_differ_in_the_workspace_line_only():
    here, there = ((EXAMPLES / name).read_text().splitlines() for name in ("01_here.py", "02_there.py"))
    differing = [(a, b) for a, b in zip(here, there, strict=True) if a != b]
    assert len(differing) == 1
    assert all("async with workspaces." in line for line in differing[0])


def test_here_and_there_give_the_same_events_and_the_same_files(running_server, tmp_path):
    before = set(running_server.data.rglob("said.txt"))
    here = run("01_here.py", EXAMPLE_DIR=str(tmp_path))
    assert run("02_there.py", **there(running_server)) == here
    (said,) = set(running_server.data.rglob("said.txt")) - before
    assert sorted(path.name for path in said.parent.iterdir()) == sorted(p.name for p in tmp_path.iterdir())
    assert said.read_bytes() == (tmp_path / "said.txt").read_bytes() == b"Hello from 42\n"
    assert (said.parent / "hello.py").read_bytes() == (tmp_path / "hello.py").read_bytes()


def test_the_blocking_snippet_runs(running_server):
    assert run("03_blocking.py", **there(running_server)).endswith("Ada\nGrace\n")
