"""Sandboxes that a server manages: started at their first use, told of, found again, ended; and nothing is left."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psutil
import pytest

from agent_sdk import Conversation, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import EngineUnavailable, InvalidParams, Overloaded
from tests.docker.conftest import remove_all
from tests.docker.images import BARE, BUSYBOX, FULL
from tests.docker.sandboxes import container, sandbox, told
from tests.docker.test_sandbox_body import GOLDEN
from tests.server.wire import GUARD
from workspaces.backend import labels

pytestmark = pytest.mark.docker


@pytest.mark.parametrize("image", [FULL, BARE, BUSYBOX])
async def test_commands_of_a_conversation_run_in_a_container_of_any_image(server, image):
    async with sandbox(server, image) as workspace:
        result = await workspace.execute(
            "echo $HOME; cd /; cat proc/self/cgroup >/dev/null; echo x >/workspace/f; id -u"
        )
        assert result.stdout.split() == ["/workspace", "10001"]
        assert await workspace.files.read("/workspace/f") == b"x\n"
        info = await workspace.describe()
        assert (info.image, info.isolation, info.working_dir) == (image, "runc", "/workspace")
        assert 0 < info.usage.memory < info.usage.memory_max == 512 << 20
        assert 0 < info.usage.pids < info.usage.pids_max == 256


async def test_a_lost_sandbox_is_told_with_its_cause_and_the_next_use_starts_another(server, engine):
    async with sandbox(server) as workspace:
        await workspace.execute("echo 1 >kept")
        first = await container(engine, workspace)
        await engine.kill(first["Id"])
        assert "SIGKILL" in (await told(workspace, ("ready", ""), ("lost", "killed"))).reason
        assert (await workspace.execute("cat kept")).stdout == "1\n"
        assert (await container(engine, workspace))["Id"] != first["Id"]


async def test_a_sandbox_removed_by_hand_is_told_as_lost(server, engine):
    async with sandbox(server) as workspace:
        await workspace.execute("true")
        await engine.remove((await container(engine, workspace))["Id"])
        await told(workspace, ("ready", ""), ("lost", "killed"))
        assert (await workspace.execute("echo again")).stdout == "again\n"


async def test_what_ran_in_a_lost_sandbox_has_an_unknown_outcome(server, engine):
    async with sandbox(server) as workspace:
        begun = asyncio.Event()
        running = asyncio.create_task(
            workspace.execute("echo begun; sleep 600", on_output=lambda name, data: begun.set())
        )
        await begun.wait()
        await engine.kill((await container(engine, workspace))["Id"])
        assert (await running).status == "unknown"


async def test_a_sandbox_that_nobody_uses_is_stopped_and_started_again_by_its_next_use(server, engine):
    async with sandbox(server, idle_ttl=1.0) as workspace:
        await workspace.execute("echo 1 >kept")
        first = await container(engine, workspace)
        await told(workspace, ("ready", ""), ("stopped", "idle"))
        assert await engine.containers({labels.CONVERSATION: workspace.conversation}) == []
        assert (await workspace.execute("cat kept")).stdout == "1\n"
        assert (await container(engine, workspace))["Id"] != first["Id"]


async def test_a_sandbox_in_which_a_call_runs_is_not_idle(server, tmp_path):
    async with sandbox(server, idle_ttl=1.0) as workspace:
        assert (await workspace.execute("sleep 3; echo still")).stdout == "still\n"


async def test_a_paused_sandbox_stands_still_until_it_is_used(server, engine):
    async with sandbox(server) as workspace:
        await workspace.start("while :; do echo x >>ticks; sleep 0.01; done")
        await workspace.pause()
        assert (await container(engine, workspace))["State"]["Status"] == "paused"
        await workspace.pause()
        await told(workspace, ("ready", ""), ("paused", ""))
        assert (await workspace.execute("echo awake")).stdout == "awake\n"
        await told(workspace, ("paused", ""), ("ready", "resumed"))
        await workspace.resume()


async def test_a_sandbox_paused_by_hand_is_woken_by_its_next_use(server, engine):
    async with sandbox(server) as workspace:
        await workspace.execute("true")
        await engine.pause((await container(engine, workspace))["Id"])
        await told(workspace, ("paused", ""))
        assert (await workspace.execute("echo awake")).stdout == "awake\n"


async def test_a_paused_sandbox_can_be_deleted(server, engine):
    async with sandbox(server) as workspace:
        await workspace.execute("true")
        await workspace.pause()
        async with Conversation(None, workspace, id=workspace.conversation) as conversation:
            await conversation.delete()
        assert await engine.containers({labels.CONVERSATION: workspace.conversation}) == []


async def test_deleting_the_last_conversation_of_a_sandbox_removes_it_with_its_files(
    server, engine, tmp_path
):
    async with sandbox(server) as workspace:
        await workspace.execute("echo 1 >kept")
        owner = workspace.conversation
        spec = {"share": owner}
        async with server.session(workspace=spec) as wire:
            answer = await wire.call("execute", argv=["cat", "kept"], op_id=new_id())
            assert answer["result"]["stdout_text"] == "1\n"
            async with Conversation(None, workspace, id=owner) as conversation:
                await conversation.delete()
            answer = await wire.call("execute", argv=["cat", "kept"], op_id=new_id())
            assert answer["result"]["stdout_text"] == "1\n"
            assert "result" in await wire.call("conversation.delete", op_id=new_id())
    assert await engine.containers({labels.CONVERSATION: owner}) == []
    left = [path for path in (tmp_path / "data").rglob(f"*{owner}*")]
    assert left == []


async def test_a_sandbox_outlives_its_server_with_what_runs_in_it(started, engine, tmp_path):
    async with started(boxes_on_stop="keep") as server, sandbox(server) as workspace:
        process = await workspace.start("read line; echo $line; sleep 600")
        id, first = workspace.conversation, await container(engine, workspace)
    async with started() as server, RemoteWorkspace(server.url, server.key, conversation=id) as workspace:
        again = workspace.process(process.id)
        await again.write(b"hello\n")
        assert await anext(again.output()) == b"hello\n"
        assert (await container(engine, workspace))["Id"] == first["Id"]
    assert await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip()) == []


async def test_the_next_server_tells_of_a_sandbox_that_died_while_there_was_none(started, engine, tmp_path):
    async with started(boxes_on_stop="keep") as server, sandbox(server) as workspace:
        await workspace.start("sleep 600")
        id, first = workspace.conversation, await container(engine, workspace)
    await engine.kill(first["Id"])
    async with started() as server, RemoteWorkspace(server.url, server.key, conversation=id) as workspace:
        assert "SIGKILL" in (await told(workspace, ("ready", ""), ("lost", "killed"))).reason
    assert await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip()) == []


async def test_the_engine_holds_exactly_what_it_was_asked_for(server, engine):
    golden = json.loads(GOLDEN.read_text())
    host = golden.pop("HostConfig")
    async with sandbox(server, FULL) as workspace:
        await workspace.execute("true")
        held = await container(engine, workspace)
    for name in ("Image", "Entrypoint", "Labels", "Env"):  # of this very container
        del golden[name]
    mounts = [
        (mount["Target"], mount.get("ReadOnly", False), mount["BindOptions"]["Propagation"])
        for mount in held["HostConfig"]["Mounts"]
    ]
    assert mounts == [
        (m["Target"], m["ReadOnly"], m["BindOptions"]["Propagation"]) for m in host.pop("Mounts")
    ]
    host["RestartPolicy"]["MaximumRetryCount"] = 0  # the engine writes it down
    assert {name: held["Config"].get(name) or None for name in golden} == {
        name: value or None for name, value in golden.items()
    }
    assert {name: held["HostConfig"].get(name) or None for name in host} == {
        name: value or None for name, value in host.items()
    }
    assert len(held["HostConfig"]["MaskedPaths"]) >= 10
    assert held["NetworkSettings"]["Networks"].keys() == {"none"}


async def test_a_sandbox_says_what_is_in_force(server):
    async with sandbox(server) as workspace:
        profile = (await workspace.describe()).profile
    assert (profile.uid, profile.gid, set(profile.groups)) == (10001, 10001, {10001})
    assert (int(profile.capabilities, 16), int(profile.capabilities_bound, 16)) == (0, 0)
    assert (profile.no_new_privileges, profile.seccomp, profile.seccomp_filters) == (True, 2, 2)
    assert (profile.read_only_root, profile.interfaces) == (True, ("lo",))
    assert (profile.pids_max, profile.memory_max) == (256, 512 << 20)


async def test_a_sandbox_that_no_server_came_back_to_ends_by_itself_and_says_so(started, engine, tmp_path):
    async with (
        started(boxes_on_stop="keep", box_linger_seconds=0.0) as server,
        sandbox(server) as workspace,
    ):
        await workspace.start("sleep 600")
        id, first = workspace.conversation, await container(engine, workspace)
    async with asyncio.timeout(GUARD):
        death = await engine.watch(first["Id"]).died
    assert death.exit_code == 0
    async with (
        started() as server,
        RemoteWorkspace(server.url, server.key, conversation=id) as workspace,
    ):
        assert "nobody was connected" in (await told(workspace, ("ready", ""), ("lost", "exit"))).reason
    assert await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip()) == []


async def test_nothing_can_be_put_into_the_folder_of_the_socket(server):
    async with sandbox(server) as workspace:
        for command in (
            "echo x >/run/agent/x",
            "rm -f /run/agent/box.sock",
            "mv /run/agent/box.sock /run/agent/y",
        ):
            assert (await workspace.execute(command)).exit_code != 0
        assert (await workspace.execute("ls /run/agent")).stdout == "box.sock\n"


# --- limits ---


@pytest.mark.parametrize(
    ("limit", "command"),
    [
        ("memory", "python3 -c 'x = bytearray(400 << 20)'"),
        ("pids", "python3 -c 'import os, time\nfor _ in range(60): os.fork() or time.sleep(60)'"),
        ("disk", "dd if=/dev/zero of=big bs=4k"),
    ],
)
async def test_a_command_that_runs_into_a_limit_is_told_and_the_sandbox_goes_on(server, limit, command):
    async with sandbox(server, FULL, memory="128m", pids=32, disk="32m") as workspace:
        await workspace.execute(command, timeout=20)
        assert (await told(workspace, ("ready", ""), ("limited", limit))).reason
        await workspace.execute("rm -f big")
        assert (await workspace.execute("echo on")).stdout == "on\n"


async def test_a_box_that_is_killed_for_want_of_memory_is_told_as_that(server, engine):
    async with sandbox(server, FULL, memory="64m") as workspace:
        await workspace.execute("true")
        first = psutil.Process((await container(engine, workspace))["State"]["Pid"])
        # Its commands are killed first, unless it is as ready to die and larger than any of them.
        Path(f"/proc/{first.children()[0].pid}/oom_score_adj").write_text("1000")
        eaten = await workspace.execute(
            "for i in $(seq 20); do python3 -c 'import time; x = b\"x\" * (4 << 20); time.sleep(60)' & done; wait"
        )
        assert eaten.status == "unknown"
        assert "memory" in (await told(workspace, ("ready", ""), ("lost", "oom"))).reason


async def test_a_sandbox_full_of_processes_keeps_no_other_from_starting(server):
    """The kernel counts some limits per user, and all sandboxes have the same one."""
    async with sandbox(server, FULL, pids=256) as full:
        program = "import os, time\nfor _ in range(200): os.fork() or time.sleep(600)\nprint(1, flush=True)"
        process = await full.start(["python3", "-c", f"{program}\ntime.sleep(600)"])
        assert await anext(process.output()) == b"1\n"
        async with sandbox(server, pids=16) as small:
            assert (await small.execute("echo started")).stdout == "started\n"


async def test_sandboxes_and_processes_count_as_boxes_alike(started):
    async with started(max_boxes=1) as server, server.session() as wire:
        assert "result" in await wire.call("execute", argv=["true"], op_id=new_id())
        async with sandbox(server) as workspace:
            with pytest.raises(Overloaded, match="limit 1 boxes"):
                await workspace.execute("true")


# --- engines that come and go ---


async def test_an_engine_that_comes_later_is_used(started, tmp_path, engine):
    socket = tmp_path / "engine.sock"
    async with started(engine=f"unix://{socket}") as server:
        with pytest.raises(EngineUnavailable, match="start Docker"):
            async with sandbox(server):
                pass
        socket.symlink_to(engine.where.removeprefix("unix://"))
        async with sandbox(server) as workspace:
            assert (await workspace.execute("echo there")).stdout == "there\n"


async def test_a_sandbox_is_found_again_although_the_engine_was_away_when_the_server_started(
    started, tmp_path, engine
):
    socket = tmp_path / "engine.sock"
    socket.symlink_to(engine.where.removeprefix("unix://"))
    async with (
        started(engine=f"unix://{socket}", boxes_on_stop="keep") as server,
        sandbox(server) as workspace,
    ):
        process = await workspace.start("read line; echo $line; sleep 600")
        id, first = workspace.conversation, await container(engine, workspace)
    away = socket.rename(tmp_path / "away.sock")
    async with (
        started(engine=f"unix://{socket}") as server,
        RemoteWorkspace(server.url, server.key, conversation=id) as workspace,
    ):
        with pytest.raises(EngineUnavailable):
            await workspace.execute("true")
        away.rename(socket)
        again = workspace.process(process.id)
        await again.write(b"hello\n")
        assert await anext(again.output()) == b"hello\n"
        assert (await container(engine, workspace))["Id"] == first["Id"]
    assert await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip()) == []


async def test_a_workspace_begins_with_a_snapshot_of_another(server, engine):
    async with sandbox(server) as workspace:
        await workspace.execute("mkdir src; echo 1 >src/kept")
        writing = await workspace.start("while :; do echo x >>ticks; done")
        taken = await workspace.snapshot()
        assert taken.size > 0
        assert (await workspace.processes())[-1].running
        assert (await container(engine, workspace))["State"]["Status"] == "running"
        await writing.signal("KILL")
        await workspace.execute("echo 2 >src/kept")
    async with sandbox(server, snapshot=taken.id) as copy:
        assert (await copy.execute("cat src/kept")).stdout == "1\n"
        await copy.files.write("more", b"3")
    with pytest.raises(InvalidParams, match="sandbox.snapshot"):
        async with sandbox(server, snapshot="nothing"):
            pass


async def test_a_paused_sandbox_that_is_gone_is_replaced_by_its_next_use(server, engine):
    async with sandbox(server) as workspace:
        await workspace.execute("true")
        await workspace.pause()
        await engine.remove((await container(engine, workspace))["Id"])
        assert (await workspace.execute("echo anew")).stdout == "anew\n"
        await told(workspace, ("ready", ""), ("paused", ""), ("lost", "killed"), ("ready", ""))


async def test_what_became_of_a_sandbox_while_nobody_was_there_is_told_to_who_comes_next(started, engine):
    async with started(idle_seconds=0.0) as server:
        async with sandbox(server, idle_ttl=3.0) as workspace:
            await workspace.execute("true")
            id, first = workspace.conversation, await container(engine, workspace)
        async with asyncio.timeout(GUARD):
            await engine.watch(first["Id"]).died
        async with RemoteWorkspace(server.url, server.key, conversation=id) as workspace:
            await told(workspace, ("ready", ""), ("stopped", "idle"))
