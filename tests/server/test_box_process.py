"""A box as a child process: its start, its end, and what it may know."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import psutil
import pytest

from agent_sdk.protocol.errors import PathNotFound, WorkspaceUnavailable
from agent_sdk.remote.workspace import RemoteWorkspace
from tests.server.wire import GUARD
from workspaces.box_process import MARKER, SOCKET_BYTES, BoxProcess


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def socket(tmp_path):
    """A path that is short enough, wherever the test run has its folders."""
    path = tmp_path / "box.sock"
    assert len(os.fsencode(path)) <= SOCKET_BYTES
    return path


ENVIRONMENT = {"PATH": os.environ["PATH"], "TESTS_RUN": os.environ["TESTS_RUN"]}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_a_box_runs_commands_until_the_block_ends(root, socket):
    async with BoxProcess(root, socket, environment=ENVIRONMENT) as box:
        async with RemoteWorkspace(box.url) as workspace:
            assert (await workspace.execute("pwd")).stdout.strip() == str(root)
        pid = box.pid
    assert gone(pid)
    assert not socket.exists()


async def test_the_socket_is_for_its_owner_alone(root, socket):
    async with BoxProcess(root, socket, environment=ENVIRONMENT):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600


async def test_a_box_knows_nothing_of_the_servers_environment(root, socket):
    async with BoxProcess(root, socket, environment=ENVIRONMENT) as box:
        environ = Path(f"/proc/{box.pid}/environ").read_bytes().decode()
        names = {entry.partition("=")[0] for entry in environ.split("\0") if entry}
        assert names <= {*ENVIRONMENT, MARKER, "LC_CTYPE"}


async def test_no_secret_is_on_its_command_line(root, socket):
    async with BoxProcess(root, socket, environment=ENVIRONMENT) as box:
        command = psutil.Process(box.pid).cmdline()
        assert command[1:3] == ["-m", "agent_sdk.box"]


async def test_a_box_has_a_session_of_its_own(root, socket):
    async with BoxProcess(root, socket, environment=ENVIRONMENT) as box:
        assert os.getsid(box.pid) == box.pid


async def test_a_path_that_is_too_long_for_a_socket_is_replaced(root, tmp_path):
    async with BoxProcess(root, tmp_path / ("x" * 120), environment=ENVIRONMENT) as box:
        path = Path(box.url.removeprefix("unix://"))
        assert len(os.fsencode(path)) <= SOCKET_BYTES
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        async with RemoteWorkspace(box.url) as workspace:
            assert (await workspace.execute("true")).exit_code == 0
    assert not path.parent.exists()


async def test_a_box_that_dies_at_its_start_is_quoted(root, tmp_path):
    (tmp_path / "in-the-way").write_text("")
    heard: list[str] = []
    box = BoxProcess(
        root,
        tmp_path / "b.sock",
        working_dir=tmp_path / "nowhere",
        environment=ENVIRONMENT,
        on_line=heard.append,
    )
    with pytest.raises(WorkspaceUnavailable, match="the box ended at its start: box: .*nowhere") as refused:
        async with box:
            pass
    assert refused.value.details["phase"] == "start"
    assert any("nowhere" in line for line in heard)


async def test_a_root_that_is_missing_is_not_found(tmp_path, socket):
    with pytest.raises(PathNotFound):
        async with BoxProcess(tmp_path / "nowhere", socket):
            pass


async def test_cancelling_the_start_leaves_no_process(root, socket, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, time\nsys.stderr.write('begun\\n')\nsys.stderr.flush()\ntime.sleep(600)\n"
    )
    begun = asyncio.Event()
    box = BoxProcess(
        root,
        socket,
        environment={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        on_line=lambda line: begun.set(),
    )
    starting = asyncio.create_task(box.__aenter__())
    await begun.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert gone(box.pid)


async def test_a_box_that_was_killed_shows_how_it_ended(root, socket):
    async with BoxProcess(root, socket, environment=ENVIRONMENT) as box:
        os.kill(box.pid, signal.SIGKILL)
        async with asyncio.timeout(GUARD):
            assert await box.wait_ended() == -signal.SIGKILL
    assert not socket.exists()


async def test_what_runs_in_a_box_that_crashes_is_ended(root, socket):
    async with (
        BoxProcess(root, socket, environment=ENVIRONMENT) as box,
        RemoteWorkspace(box.url) as workspace,
    ):
        await workspace.start(["setsid", "sleep", "600"])
        running = [info.pid for info in await workspace.processes()]
        os.kill(box.pid, signal.SIGKILL)
    assert [gone(pid) for pid in running] == [True]


async def test_what_runs_in_a_box_ends_with_it(root, socket):
    async with (
        BoxProcess(root, socket, environment=ENVIRONMENT) as box,
        RemoteWorkspace(box.url) as workspace,
    ):
        process = await workspace.start(["sleep", "600"])
        running = [info.pid for info in await workspace.processes() if info.id == process.id]
    assert [gone(pid) for pid in running] == [True]
