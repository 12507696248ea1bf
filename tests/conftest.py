"""A real server for tests that need one, as its users run it: a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class RunningServer:
    url: str
    api_key: str
    data: Path
    pid: int


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the whole run; every workspace and conversation on it is fresh."""
    data = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "agent_server", "serve", "--port", "0", "--json", "--data", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            key = Path(ready["api_key_file"]).read_text().strip()
            yield RunningServer(ready["url"], key, data, process.pid)
        finally:
            process.terminate()
            left = process.wait(timeout=30)
    assert left == 0
