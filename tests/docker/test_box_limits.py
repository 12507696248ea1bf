"""What runs into a limit of its sandbox is told why, and disturbs nothing else."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager

import msgspec
import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.agent.tools.terminal import TerminalTool
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.methods.workspace import Execute, LimitReached
from agent_sdk.remote.connection import connect
from agent_sdk.tools import ToolContext
from tests.docker.boxes import box
from tests.docker.images import BARE
from tests.docker.sandboxes import sandbox
from tests.server.wire import GUARD

pytestmark = pytest.mark.docker

FILL = "while (defined($p = fork)) { if (!$p) { sleep 600; exit } push @all, $p } $| = 1; print qq(full\\n);"
"""Starts processes until no more can be started; bash would try again for 15 s."""
MAKE_ROOM = "<STDIN>; kill KILL => @all; 1 while wait > 0"
"""At the end of its input: one that is killed takes its place until somebody has waited for it."""


@asynccontextmanager
async def workspace_in(sandboxes, owner="one", **wanted):
    async with (
        box(sandboxes, owner, BARE, **wanted) as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        yield workspace


async def test_a_command_that_is_killed_for_want_of_memory_says_so(opened):
    async with opened() as sandboxes, workspace_in(sandboxes, memory="64m") as workspace:
        result = await workspace.execute("tail /dev/zero")
        assert (result.status, result.signal) == ("killed", 9)
        assert result.reason == "killed: out of memory (limit 64 MiB)"
        result = await workspace.execute("tail /dev/zero; exit 3")
        assert (result.exit_code, result.reason) == (3, "killed: out of memory (limit 64 MiB)")


async def test_a_memory_kill_is_told_in_shells_and_to_the_model(opened):
    told = "killed: out of memory (limit 64 MiB)"
    async with opened() as sandboxes, workspace_in(sandboxes, memory="64m") as workspace:
        shell = workspace.shell()
        assert (await shell.run("true")).reason == ""
        killed = await shell.run("tail /dev/zero")
        assert (killed.status, killed.exit_code, killed.reason) == ("done", 137, told)
        assert (await shell.run("tail /dev/zero | cat")).reason == told  # its exit code says nothing
        arguments = '{"command": "tail /dev/zero"}'
        result = await TerminalTool("model").run(arguments, ToolContext(workspace=workspace, secrets={}))
        assert f"[{told}]\n[The command completed with exit code 137.]" in result.text


async def test_a_memory_kill_is_told_of_whatever_was_started(opened):
    told = "killed: out of memory (limit 64 MiB)"
    async with opened() as sandboxes, workspace_in(sandboxes, memory="64m") as workspace:
        for pty in (False, True):
            process = await workspace.start("tail /dev/zero", pty=pty)
            assert (await process.wait()).reason == told
        piped = await workspace.execute("tail /dev/zero | cat")
        assert (piped.exit_code, piped.reason) == (0, told)
        late = await workspace.execute("tail /dev/zero; exec sleep 600", timeout=3)
        assert (late.status, late.reason) == ("timeout", told)
        ended = await workspace.shell().run("exec tail /dev/zero")
        assert (ended.status, ended.reason) == ("ended", told)


@pytest.mark.parametrize(("command", "code"), [("tail /dev/zero", 137), ("tail /dev/zero | cat", 0)])
async def test_a_memory_kill_is_told_by_the_command_line(server, command, code):
    async with sandbox(server, BARE, memory="64m") as workspace:
        words = ["exec", "--url", server.url, "--conversation", workspace.conversation, command]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "agent_server", *words),
            env={**os.environ, "AGENT_SERVER_API_KEY": server.key},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, trouble = await process.communicate()
    assert trouble.decode().splitlines()[-1] == "agent-server: killed: out of memory (limit 64 MiB)"
    assert (process.returncode, said) == (code, b"")


async def test_many_small_processes_that_take_all_memory_die_before_the_box(opened):
    async with opened() as sandboxes, workspace_in(sandboxes, memory="64m") as workspace:
        box_before = (await workspace.describe()).pid
        many = (
            "for i in $(seq 40); do sh -c 'x=$(head -c 4000000 /dev/zero | tr \"\\0\" x); sleep 600' & done"
        )
        result = await workspace.execute(f"{many}; wait -n; exit 1")
        assert "out of memory" in result.reason
        assert (await workspace.describe()).pid == box_before


async def test_a_command_that_cannot_start_processes_says_so(opened):
    async with opened() as sandboxes, workspace_in(sandboxes, pids=32) as workspace:
        result = await workspace.execute(["perl", "-e", f"{FILL} exit 1"])
        assert result.reason == "no more processes can be started (limit 32 processes)"


async def test_a_command_for_which_there_is_no_room_says_so(opened):
    async with opened() as sandboxes, workspace_in(sandboxes, pids=16) as workspace:
        filling = await workspace.start(["perl", "-e", f"{FILL} {MAKE_ROOM}"])
        assert await anext(filling.output()) == b"full\n"
        result = await workspace.execute(["true"])
        assert (result.status, result.exit_code) == ("spawn_failed", 126)
        assert result.reason.startswith("EAGAIN: Resource temporarily unavailable: no more processes")
        await filling.close_stdin()
        await filling.wait()
        assert (await workspace.execute("echo again")).stdout == "again\n"


async def test_a_fork_bomb_is_ended_when_its_time_is_over(opened):
    async with opened() as sandboxes, workspace_in(sandboxes, pids=64) as workspace:
        result = await workspace.execute(
            "bomb() { bomb | bomb & }; bomb; exec tail -f /dev/null", timeout=1.0
        )
        assert (result.status, result.reason) == (
            "timeout",
            "no more processes can be started (limit 64 processes)",
        )
        async with asyncio.timeout(GUARD):
            left = await workspace.execute("cat /proc/[0-9]*/comm")
        assert sorted(left.stdout.split()) == ["cat", "ld.so", "ld.so"]


async def test_processes_of_one_sandbox_do_not_count_in_another(opened):
    async with (
        opened() as sandboxes,
        workspace_in(sandboxes, "one", pids=256) as one,
        workspace_in(sandboxes, "other", pids=16) as other,
    ):
        filling = await one.start(["perl", "-e", f"{FILL} sleep 600"])
        assert await anext(filling.output()) == b"full\n"
        assert (await other.execute("echo $(echo fine)")).stdout == "fine\n"


async def test_a_full_disk_is_told_to_commands_and_uploads(opened):
    async with opened() as sandboxes, workspace_in(sandboxes, disk="16m") as workspace:
        result = await workspace.execute("dd if=/dev/zero of=f bs=1M")
        assert result.exit_code == 1
        assert result.reason == "no space left on the disk of /workspace"
        with pytest.raises(StorageFull):
            await workspace.files.write("g", bytes(3 << 20))
        await workspace.files.remove("f")
        assert (await workspace.execute("exit 1")).reason == ""


async def test_whoever_is_connected_hears_of_a_limit(opened):
    async with (
        opened() as sandboxes,
        box(sandboxes, image=BARE, memory="64m") as started,
        heard_from(started) as (one, heard),
        heard_from(started) as (_, heard_by_another),
    ):
        await one.call(Execute(op_id=new_id(), shell="tail /dev/zero"))
        await one.call(Execute(op_id=new_id(), shell="exit 1"))
        async with asyncio.timeout(GUARD):
            wanted = ("memory", "out of memory (limit 64 MiB)")
            assert await heard.get() == wanted
            assert await heard_by_another.get() == wanted
        assert heard.empty()


@asynccontextmanager
async def heard_from(started):
    """A connection to a box, and the limits it tells of."""
    heard = asyncio.Queue()

    def hear(method, params):
        notice = msgspec.json.decode(params, type=LimitReached)
        heard.put_nowait((notice.limit, notice.detail))

    async with connect(started.url, started.token, on_notice=hear) as connection:
        yield connection.peer, heard
