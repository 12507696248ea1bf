"""Turns in a sandbox whose server is killed: what is promised for plain boxes holds for containers."""

from __future__ import annotations

import pytest

from agent_sdk.ids import new_id
from tests.docker.conftest import remove_all
from tests.docker.images import BUSYBOX
from tests.server.test_turns_survive import Server, call, is_a, say, scripted, these
from tests.server.test_turns_survive import pipe as pipe
from workspaces.backend import labels

pytestmark = pytest.mark.docker


@pytest.fixture
async def server(tmp_path, engine, box_runtime):
    """Start servers on one data folder, one after the other; nothing of them is left on the engine."""
    started = []

    async def start():
        options = {"AGENT_SERVER_BOX_RUNTIME": str(box_runtime), "AGENT_SERVER_SANDBOX_MOUNTS": str(tmp_path)}
        started.append(await Server.start(tmp_path / "data", AGENT_SERVER_BOXES_ON_STOP="end", **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.returncode is None:
            await each.terminate()
        await each.http.close()
    left = await remove_all(engine, (tmp_path / "data" / "instance").read_text().strip())
    assert not left, f"left behind on the engine: {left}"


@pytest.fixture
def shared(tmp_path, pipe):
    """Named pipes in a folder that sandboxes have at /shared."""
    tmp_path.chmod(0o755)

    def shared(name):
        made = pipe(name)
        made.path.chmod(0o666)
        return made

    return shared


async def conversation(server, tmp_path, *steps):
    """A new conversation in a sandbox, whose model says this."""
    workspace = {"sandbox": {"image": BUSYBOX, "mounts": [f"{tmp_path}:/shared"]}}
    hello = await server.call(
        "initialize", protocol_version=1, client={"name": "test", "version": "0"}, workspace=workspace
    )
    id = hello["conversation"]
    await server.call("conversation.configure", id, op_id=new_id(), agent=scripted(*steps))
    return id


async def test_a_command_goes_on_in_its_sandbox_and_the_next_server_has_its_result(server, shared, tmp_path):
    begun, go = shared("begun"), shared("go")
    command = "echo once >>ran; echo >/shared/begun; read line </shared/go; echo $line; cat ran"
    first = await server()
    id = await conversation(first, tmp_path, call("terminal", command=command), say("all done"))
    await first.say(id)
    await begun.line()
    await first.kill()
    second = await server()
    await second.until(id, is_a("turn_resumed"))
    go.write("the rest")
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert "the rest\nonce" in returned["text"]
    assert events[-1]["final_text"] == "all done"
    assert [event["state"] for event in these(events, "workspace_changed")] == ["ready"]


async def test_a_command_whose_sandbox_died_with_its_server_is_unknown_and_not_run_again(
    server, shared, tmp_path, engine
):
    begun = shared("begun")
    first = await server()
    steps = call("terminal", command="echo run >>ran; echo >/shared/begun; sleep 600"), say("lost it")
    id = await conversation(first, tmp_path, *steps)
    await first.say(id)
    await begun.line()
    await first.kill()
    (found,) = await engine.containers({labels.CONVERSATION: id})
    await engine.kill(found["Id"])
    second = await server()
    events = await second.until(id, is_a("turn_ended"))
    [returned] = these(events, "tool_returned")
    assert "unknown" in returned["text"]
    [lost] = [event for event in these(events, "workspace_changed") if event["state"] == "lost"]
    assert (lost["cause"], "SIGKILL" in lost["reason"]) == ("killed", True)
    ran = await second.call("execute", id, op_id=new_id(), argv=["cat", "ran"])
    assert ran["stdout_text"] == "run\n"
