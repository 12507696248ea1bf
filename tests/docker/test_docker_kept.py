"""A container that is kept outlives its client and is found again by its name."""

import asyncio
import json

import pytest

from agent_sdk import Agent, Conversation
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.testing import ScriptedLLM, say
from tests.docker.images import BUSYBOX
from tests.docker.servers import SERVER, state, there, volumes_of
from workspaces import DockerWorkspace
from workspaces.backend import labels

pytestmark = pytest.mark.docker


async def leave_one(name):
    """Keep a container in which one conversation has taken place, and return its id."""
    async with DockerWorkspace(SERVER, name=name, keep=True) as workspace:
        await workspace.execute("echo once > /tmp/said.txt")
        conversation = Conversation(Agent(llm=ScriptedLLM([say("Hello.")])), workspace)
        await conversation.send_message("Say hello.")
        await conversation.run()
        return conversation.id


async def test_it_is_used_again_with_its_files_and_its_conversations(engine, free_name):
    known = await leave_one(free_name)
    made = (await engine.inspect(free_name))["Id"]
    volumes = await volumes_of(engine, free_name)
    async with DockerWorkspace(SERVER, name=free_name, conversation=known) as workspace:
        assert (await engine.inspect(free_name))["Id"] == made
        assert (await workspace.execute("cat /tmp/said.txt")).stdout == "once\n"
        told = Conversation(None, workspace, id=known)
        assert "Hello." in str([event async for event in told.events()])
    assert await state(engine, free_name) is None
    assert not await there(engine, volumes)


async def test_what_the_server_said_before_is_not_told_again(free_name):
    await leave_one(free_name)
    lines = []
    async with DockerWorkspace(SERVER, name=free_name, on_log=lines.append) as workspace:
        await workspace.execute("true")
    told = [json.loads(line)["event"] for line in lines]
    assert "conversation_made" in told
    assert "server_started" not in told


@pytest.mark.parametrize("rest", ["pause", "stop"])
async def test_it_goes_on_when_it_was_paused_or_stopped_meanwhile(engine, free_name, rest):
    known = await leave_one(free_name)
    await getattr(engine, rest)(free_name)
    async with DockerWorkspace(SERVER, name=free_name, conversation=known) as workspace:
        told = Conversation(None, workspace, id=known)
        assert "Hello." in str([event async for event in told.events()])


async def test_a_start_that_fails_keeps_nothing(engine, free_name):
    with pytest.raises(InvalidParams):
        async with DockerWorkspace(SERVER, name=free_name, keep=True, volumes=["no-such-volume:/in"]):
            pass
    assert await state(engine, free_name) is None


async def test_one_that_is_in_use_by_another_client_is_not_taken(engine, free_name):
    async with DockerWorkspace(SERVER, name=free_name):
        with pytest.raises(InvalidParams, match="in use by another client"):
            await DockerWorkspace(SERVER, name=free_name).__aenter__()
        assert await state(engine, free_name) == "running"


async def test_one_with_another_image_is_not_taken(engine, free_name):
    await leave_one(free_name)
    with pytest.raises(InvalidParams, match=f"kept with the image {SERVER}, not {BUSYBOX}"):
        await DockerWorkspace(BUSYBOX, name=free_name).__aenter__()
    assert await state(engine, free_name) == "running"
    async with DockerWorkspace(SERVER, name=free_name):
        pass


async def test_one_that_is_somebody_elses_is_not_touched(engine, instance, free_name):
    body = {"Image": BUSYBOX, "Cmd": ["sleep", "100"], "Labels": {labels.INSTANCE: instance}}
    id = await engine.create(free_name, body)
    with pytest.raises(InvalidParams, match="is no agent server that was started from here"):
        await DockerWorkspace(SERVER, name=free_name).__aenter__()
    assert await state(engine, free_name) == "created"
    await engine.remove(id)


def test_one_that_is_to_be_kept_needs_a_name():
    with pytest.raises(InvalidParams, match="keep: a container that is kept needs a name"):
        DockerWorkspace(SERVER, keep=True)


async def test_one_that_was_to_go_on_in_vain_is_still_kept(engine, free_name):
    known = await leave_one(free_name)

    def on_progress(phase, done, total):
        if phase == "start":
            entering.cancel()

    workspace = DockerWorkspace(SERVER, name=free_name, on_progress=on_progress)
    entering = asyncio.create_task(workspace.__aenter__())
    with pytest.raises(asyncio.CancelledError):
        await entering
    async with DockerWorkspace(SERVER, name=free_name, conversation=known) as workspace:
        assert (await workspace.execute("cat /tmp/said.txt")).stdout == "once\n"


async def test_a_volume_of_the_users_stays_whatever_its_name_is(engine, free_name):
    volume = f"{free_name}-data"
    await engine.create_volume(volume, {"Labels": {}})
    try:
        async with DockerWorkspace(SERVER, name=free_name, volumes=[f"{volume}:/more"]) as workspace:
            await workspace.execute("true")
        assert volume in {each["Name"] for each in await engine.volumes({})}
    finally:
        await engine.remove_volume(volume)
