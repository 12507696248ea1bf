"""The program as people run it: a process of its own, in an environment of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent_server.cli.main import main
from tests.conftest import SHORT_LIVED, RunningServer

PROGRAM = [sys.executable, "-m", "agent_server"]
FOREIGN = ("AGENT_SERVER_", "LLM_", "DOCKER_", "XDG_")


@dataclass
class Shell:
    """Runs `agent-server`; remembers the environment and the folder."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.environ = {**own, **SHORT_LIVED, "HOME": str(self.folder), "NO_COLOR": "1", **self.environ}

    def run(self, *words: str, stdin: bytes = b"", **environ: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*PROGRAM, *words],
            input=stdin,
            capture_output=True,
            cwd=self.folder,
            env={**self.environ, **environ},
            timeout=60,
            check=False,
        )

    def start(self, *words: str, **options: object) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*PROGRAM, *words], cwd=self.folder, env=self.environ, **{**pipes, **options})


@dataclass(frozen=True)
class Done:
    """What a command line left: as of a process."""

    returncode: int
    stdout: bytes
    stderr: bytes


@pytest.fixture
def perform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., Done]:
    """Runs a command line in this process: the same `main`, without the time that a process takes to start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)

    def run(*words: str, **environ: str) -> Done:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        try:
            code = main(words)
        except SystemExit as exc:
            code = int(exc.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        return Done(code, *capfdbinary.readouterr())

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A user without a server."""
    return Shell(tmp_path)


@pytest.fixture
def client(tmp_path: Path, running_server: RunningServer) -> Shell:
    """A user whose environment names the running server and its key."""
    environ = {"AGENT_SERVER_URL": running_server.url, "AGENT_SERVER_API_KEY": running_server.api_key}
    return Shell(tmp_path, environ)


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A script in which the agent writes a file, reads it, and is done."""
    file = tmp_path / "script.json"
    file.write_text(
        '[{"step": "call", "tool": "terminal", "arguments": {"command": "echo hello | tee said.txt"}},'
        ' {"step": "say", "text": "It says hello."}]'
    )
    return str(file)


@pytest.fixture
def hanging(tmp_path: Path) -> str:
    """A script in which the model does not answer."""
    file = tmp_path / "hang.json"
    file.write_text('[{"step": "hang"}]')
    return str(file)
