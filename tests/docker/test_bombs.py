"""What goes off in a sandbox ends there: with a reason, an event, and a workspace that can be used again."""

from __future__ import annotations

import asyncio
import signal

import pytest

from agent_sdk import Conversation, RemoteWorkspace
from agent_sdk.protocol.errors import AgentServerError, IsolationUnavailable
from agent_sdk.protocol.events import WorkspaceChanged
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.contract import Workspace
from tests.docker import images
from tests.docker.fresh import fresh
from tests.docker.test_attacks import PYTHON

pytestmark = pytest.mark.docker

SECONDS = 60
MIB = 1 << 20
ZOMBIES = "import os,sys,time\nfor _ in range(500):\n  if not os.fork(): os._exit(0)\n"
DESCRIPTORS = (
    "import os\nn=0\ntry:\n  while True: os.dup(0); n+=1\nexcept OSError as e: print(n, e.strerror)\n"
)


@pytest.fixture
async def sandbox(running_server):
    """A small one."""
    small = Sandbox(image=images.FULL, memory="96m", pids=64)
    place = RemoteWorkspace(running_server.url, running_server.api_key, sandbox=small)
    async with asyncio.timeout(SECONDS), fresh(place) as workspace:
        yield workspace


async def told(workspace: RemoteWorkspace, state: str, cause: str) -> WorkspaceChanged:
    """The event of this change, now or when it comes."""
    async with asyncio.timeout(SECONDS), Conversation(None, workspace, id=workspace.conversation) as log:
        async for event in log.events(follow=True):
            if isinstance(event, WorkspaceChanged) and (event.state, event.cause) == (state, cause):
                return event
    raise AssertionError("the log ended")


async def still_works(workspace: Workspace) -> None:
    assert (await workspace.execute("echo works")).stdout == "works\n"


async def processes(workspace: Workspace) -> list[str]:
    """The states of all processes but our own."""
    result = await workspace.execute(["ps", "-eo", "stat=,comm="])
    return [line for line in result.stdout.splitlines() if not line.split()[1].startswith("ps")]


async def test_a_fork_bomb_stops_at_the_limit_and_is_ended_with_its_command(sandbox):
    before = len(await processes(sandbox))
    result = await sandbox.execute("bomb() { bomb | bomb & }; bomb; sleep 600", timeout=2.0)
    assert result.timed_out
    assert "64" in (await told(sandbox, "limited", "pids")).reason
    await still_works(sandbox)
    assert len(await processes(sandbox)) == before


async def test_a_command_that_takes_all_memory_is_killed_and_nothing_else(sandbox):
    result = await sandbox.execute("tail /dev/zero")
    assert "out of memory" in result.reason
    assert "96" in (await told(sandbox, "limited", "memory")).reason
    await still_works(sandbox)


async def test_a_folder_in_memory_is_full_before_the_sandbox_is(sandbox):
    result = await sandbox.execute("head -c 1G /dev/zero > /dev/shm/fill")
    assert (result.exit_code, "No space left" in result.stderr) == (1, True)
    await sandbox.execute("rm /dev/shm/fill")
    await still_works(sandbox)


async def test_a_workspace_is_full_before_the_disk_of_the_machine_is(running_server):
    limited = Sandbox(image=images.BUSYBOX, disk="64m")
    place = RemoteWorkspace(running_server.url, running_server.api_key, sandbox=limited)
    async with asyncio.timeout(SECONDS), fresh(place) as workspace:
        try:
            result = await workspace.execute("dd if=/dev/zero of=fill bs=1M count=1000")
        except IsolationUnavailable as exc:
            pytest.skip(f"this machine cannot limit a workspace: {exc}")
        assert (result.exit_code, "No space left" in result.stderr) == (1, True)
        await told(workspace, "limited", "disk")
        await workspace.files.remove("fill")
        await still_works(workspace)


async def test_a_file_has_a_longest_length(sandbox):
    result = await sandbox.execute("truncate --size 3G long")
    assert (result.status, result.signal) == ("killed", signal.SIGXFSZ)
    await still_works(sandbox)


async def test_descriptors_run_out_for_the_program_that_takes_them(sandbox):
    result = await sandbox.execute([*PYTHON, "-c", DESCRIPTORS])
    count, _, reason = result.stdout.strip().partition(" ")
    assert (int(count) <= 4096, reason) == (True, "Too many open files")
    await still_works(sandbox)


async def test_zombies_run_into_the_limit_and_are_gone_with_whoever_made_them(sandbox):
    result = await sandbox.execute([*PYTHON, "-c", ZOMBIES])
    assert (result.exit_code, "BlockingIOError" in result.stderr) == (1, True)
    await told(sandbox, "limited", "pids")
    await still_works(sandbox)
    assert [line for line in await processes(sandbox) if line.startswith("Z")] == []


async def test_a_flood_of_output_is_counted_and_cut(sandbox):
    result = await sandbox.execute("head -c 300M /dev/zero")
    assert (result.exit_code, result.out.size, result.truncated) == (0, 300 * MIB, True)
    await still_works(sandbox)


@pytest.mark.parametrize("command", ["kill -9 -1", "kill -9 $PPID"], ids=["everything", "the box"])
async def test_a_command_that_kills_its_box_has_an_unknown_outcome_and_the_next_one_works(sandbox, command):
    await sandbox.execute("echo kept > kept")
    try:
        status = (await sandbox.execute(f"{command}; sleep 600")).status
    except AgentServerError as exc:
        status = exc.kind
    assert status in ("unknown", "outcome_unknown")
    await told(sandbox, "lost", "killed")
    assert (await sandbox.execute("cat kept")).stdout == "kept\n"
