"""A workspace in a container of its own: started, used, paused, and gone without a trace."""

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from agent_sdk import Agent, Conversation
from agent_sdk.protocol.errors import PathError, WorkspaceLost
from agent_sdk.testing import ScriptedLLM, call, say
from tests.docker.servers import SERVER, state, there, volumes_of
from workspaces import DockerWorkspace

pytestmark = pytest.mark.docker


async def test_commands_files_and_an_agent_work_in_it(tmp_path):
    agent = Agent(llm=ScriptedLLM([call("terminal", command="sort names.txt"), say("Sorted.")]))
    names = tmp_path / "names.txt"
    names.write_text("Grace\nAda\n")
    events = []
    async with DockerWorkspace(SERVER) as workspace:
        await workspace.upload(names, "names.txt")
        conversation = Conversation(agent=agent, workspace=workspace, callbacks=[events.append])
        await conversation.send_message("Sort the names.")
        assert (await conversation.run()).final_text == "Sorted."
        assert (await workspace.execute("pwd; cat names.txt")).stdout == "/workspace\nGrace\nAda\n"
    assert "Ada\\nGrace" in str(events) or "Ada\nGrace" in str(events)


async def test_nothing_is_left_of_it_after_the_block(engine):
    async with DockerWorkspace(SERVER) as workspace:
        name = workspace.container
        volumes = await volumes_of(engine, name)
        assert await state(engine, name) == "running"
        assert volumes
    assert await state(engine, name) is None
    assert not await there(engine, volumes)


async def test_nothing_is_left_of_it_after_an_exception_in_the_block(engine):
    with pytest.raises(ZeroDivisionError):
        async with DockerWorkspace(SERVER) as workspace:
            name = workspace.container
            raise ZeroDivisionError
    assert await state(engine, name) is None


@pytest.mark.parametrize("phase", ["create", "start", "ready"])
async def test_a_cancel_at_any_point_of_its_start_leaves_nothing(engine, phase, free_name):
    def on_progress(now, done, total):
        if now == phase and done == 0:
            entering.cancel()

    async def enter():
        async with DockerWorkspace(SERVER, name=free_name, on_progress=on_progress):
            pytest.fail("it was entered")

    entering = asyncio.create_task(enter())
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert await state(engine, free_name) is None


async def test_its_start_is_told_phase_by_phase():
    told = []
    async with DockerWorkspace(SERVER, on_progress=lambda *now: told.append(now)):
        pass
    phases = list(dict.fromkeys(phase for phase, _, _ in told))
    assert phases == ["engine", "create", "start", "ready"]
    assert told[-1:] == [("ready", 1, 1)]


async def test_it_is_published_on_this_machine_only_with_a_key_of_its_own(engine):
    async with DockerWorkspace(SERVER) as one, DockerWorkspace(SERVER) as other:
        found = await engine.inspect(one.container)
        (published,) = found["NetworkSettings"]["Ports"]["8000/tcp"]
        assert published["HostIp"] == "127.0.0.1"
        assert one.target.api_key != other.target.api_key
        assert one.target.api_key not in str(found["Config"]["Cmd"]) + str(found["Config"]["Labels"])
        assert one.target.api_key not in repr(one)


async def test_it_has_no_capability_and_no_limit_more_than_its_image_needs(engine):
    async with DockerWorkspace(SERVER, memory="256m", cpus=0.5, pids=200) as workspace:
        host = (await engine.inspect(workspace.container))["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert set(host["CapAdd"]) == {"CHOWN", "KILL", "SETGID", "SETPCAP", "SETUID"}
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"], host["PidsLimit"]) == (
        256 << 20,
        256 << 20,
        500_000_000,
        200,
    )
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
    assert not host["Privileged"]


async def test_calls_wait_while_it_is_paused_and_go_on_afterwards(engine):
    async with DockerWorkspace(SERVER) as workspace:
        await workspace.pause()
        assert await state(engine, workspace.container) == "paused"
        running = asyncio.create_task(workspace.execute("echo went on"))
        await workspace.resume()
        assert (await running).stdout == "went on\n"


async def test_the_lines_of_the_server_reach_the_program_that_started_it():
    told: list[str] = []
    box_started = asyncio.Event()

    def note(line: str) -> None:
        told.append(json.loads(line)["event"])
        if told[-1] == "box_started":
            box_started.set()

    async with DockerWorkspace(SERVER, on_log=note) as workspace:
        await workspace.execute("true")
        await box_started.wait()
    assert "server_started" in told


async def test_when_its_container_dies_every_call_says_why(engine):
    async with DockerWorkspace(SERVER) as workspace:
        conversation = Conversation(Agent(llm=ScriptedLLM([say("hm")])), workspace)
        await conversation.state()
        running = asyncio.create_task(workspace.execute("cat", stdin=None, timeout=60))
        await engine.kill(workspace.container)
        with pytest.raises(WorkspaceLost, match="exit code 137"):
            await running
        with pytest.raises(WorkspaceLost, match="exit code 137"):
            await workspace.execute("true")
        with pytest.raises(WorkspaceLost, match="exit code 137"):
            await conversation.state()


async def test_a_connection_that_is_lost_in_a_long_pause_is_made_again():
    told = []
    changed = asyncio.Event()

    def on_connection(reason):
        told.append(reason)
        changed.set()

    async with DockerWorkspace(SERVER, heartbeat=0.5, on_connection=on_connection) as workspace:
        await workspace.execute("echo before > said.txt")
        await workspace.pause()
        await changed.wait()
        running = asyncio.create_task(workspace.execute("cat said.txt"))
        await workspace.resume()
        assert (await running).stdout == "before\n"
    assert told[0] is not None


async def test_one_that_is_paused_can_be_left(engine):
    async with DockerWorkspace(SERVER) as workspace:
        name = workspace.container
        await workspace.pause()
    assert await state(engine, name) is None


async def test_no_command_and_no_file_call_reads_what_is_the_servers(engine):
    async with DockerWorkspace(SERVER) as workspace:
        key = workspace.target.api_key
        seen = await workspace.execute(
            "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; ps -ef; find / -xdev -user 10000 -exec cat {} +"
        )
        assert key not in seen.stdout + seen.stderr
        assert not seen.truncated
        assert "Permission denied" in seen.stderr
        server = (await workspace.execute("pgrep -u 10000 -f 'agent-server serve' | tail -1")).stdout.strip()
        assert (await workspace.execute(f"kill -9 {server}")).exit_code == 1
        for path in (f"/proc/{server}/environ", f"/proc/{server}/mem", "/data/log.db"):
            with pytest.raises(PathError):
                await workspace.files.read(path)
        assert key not in str((await engine.inspect(workspace.container))["Config"]["Labels"])


async def test_several_start_at_once_and_each_has_its_own():
    async with AsyncExitStack() as stack:
        starting = (stack.enter_async_context(DockerWorkspace(SERVER)) for _ in range(4))
        workspaces = await asyncio.gather(*starting)
        said = await asyncio.gather(*(each.execute("hostname") for each in workspaces))
    assert len({result.stdout for result in said}) == 4


async def test_the_least_memory_is_enough_for_a_server_and_a_command():
    async with DockerWorkspace(SERVER, memory="64m") as workspace:
        assert (await workspace.execute("echo fits")).stdout == "fits\n"


async def test_a_memory_kill_in_it_is_told_as_one():
    async with DockerWorkspace(SERVER, memory="256m") as workspace:
        killed = await workspace.execute("tail /dev/zero")
        assert (killed.signal, killed.reason) == (9, "killed: out of memory (limit 256 MiB)")
        assert (
            await workspace.shell().run("tail /dev/zero")
        ).reason == "killed: out of memory (limit 256 MiB)"


async def test_it_can_be_entered_again():
    workspace = DockerWorkspace(SERVER)
    for _ in range(2):
        async with workspace:
            assert (await workspace.execute("ls -A")).stdout == ""
            await workspace.execute("touch said.txt")
