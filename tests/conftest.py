"""A real server for tests that need one, as its users run it: a process of its own."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Loaded now: its pytest plugin loads it during the first test otherwise, and CPython 3.11 can fail to parse
# it ("AST constructor recursion depth mismatch") while threads of that test run.
import hypothesis  # noqa: F401
import pytest

# Commands inherit the environment, so those of this run can be told from those of another.
os.environ["TESTS_RUN"] = secrets.token_hex(8)
RUN = f"TESTS_RUN={os.environ['TESTS_RUN']}".encode()

STRANGERS = set(os.listdir("/proc"))
"""Processes that were there before this run, so they are none of it; and what else is in there."""

SHORT_LIVED = {"AGENT_SERVER_BOXES_ON_STOP": "end", "AGENT_SERVER_BOX_LINGER_SECONDS": "120"}
"""For servers of tests: nothing stays for long, also when the run is killed."""

MARKERS = (
    "place: of a contract, what depends on the place: its processes, users, files, limits, links",
    "elsewhere: a contract in one more place, where only what is marked `place` is tried (all: make test-all)",
)
USUAL_SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGQUIT: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--once", action="store_true", help="run every test with its first parameters alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--once`, keep of every test the case with its first parameters: the code it runs is the same in all."""
    if config.getoption("--once"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item)
        kept = list(first.values())
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """Give this run a place of its own for temporary files, so that it sees only what it left itself.

    In the background of a script it ignores some signals, and every program that a test starts would, too.
    """
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    for number, usual in USUAL_SIGNALS.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="tests-")
    tempfile.tempdir = None


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ.pop("TMPDIR"), ignore_errors=True)


@dataclass(frozen=True)
class RunningServer:
    url: str
    api_key: str
    data: Path
    pid: int


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the whole run; every workspace and conversation on it is fresh."""
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@contextmanager
def serving(data: Path, **environment: str) -> Iterator[RunningServer]:
    """Run a server for the length of the block."""
    command = [sys.executable, "-m", "agent_server", "serve", "--port", "0", "--json", "--data", str(data)]
    environment = {**os.environ, **SHORT_LIVED, **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            key = Path(ready["api_key_file"]).read_text().strip()
            yield RunningServer(ready["url"], key, data, process.pid)
        finally:
            process.terminate()
            ended = process.wait(timeout=30)
    assert ended == 0
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if names(path, data)]


def names(cmdline: Path, folder: Path) -> bool:
    """Whether a process was started for this folder; one that has ended was not."""
    with suppress(OSError):
        return str(folder).encode() in cmdline.read_bytes()
    return False


def let_others_through(folder: Path) -> None:
    """Let other users reach what they may use in here; the folders of pytest let nobody through."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid() and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No process, box, socket or temporary folder of ours outlives the test that made it."""
    if "running_server" in request.fixturenames:
        request.getfixturevalue("running_server")  # it stays for the whole run
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
    stays = folder / "server0"  # of running_server
    before = remains()
    yield
    left = remains() - before
    for process in others():
        if is_box(process, folder) and not names(process / "cmdline", stays):
            left.add(f"box {process.name}")
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGTERM)  # it ends what it runs
    assert not left, f"left behind: {sorted(left)}"


def others() -> list[Path]:
    """All processes that began during this run, in /proc."""
    there = set(os.listdir("/proc"))
    STRANGERS.intersection_update(there)
    return [Path("/proc", name) for name in there - STRANGERS]


def is_box(process: Path, folder: Path) -> bool:
    """Whether it is a box below this folder, also one that its server has left to itself."""
    return names(process / "cmdline", folder) and names(process / "cmdline", Path("agent_sdk.box"))


def remains() -> set[str]:
    """Processes of commands, boxes and servers; temporary folders; descriptors of sockets of this process."""
    found = {str(path) for path in Path(tempfile.gettempdir()).glob("agent-*")}
    for process in others():
        with suppress(OSError):
            if is_ours(process):
                found.add(f"process {process.name}")
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(descriptor)
            if target.startswith("socket:"):
                found.add(target)
    return found


def is_ours(process: Path) -> bool:
    """Whether it is a child of this run, or a command that a workspace of this run started."""
    environment = (process / "environ").read_bytes()
    if b"AGENT_SERVER_OP=" in environment and RUN in environment:
        return True
    state, parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[:2]
    return int(parent) == os.getpid() and state != "Z"
