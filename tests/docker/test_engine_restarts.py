"""An engine that is killed and comes again: no death is missed, no call hangs, none is made twice."""

import asyncio
import os
import signal

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import EngineUnavailable, WorkspaceUnavailable
from tests.docker.images import BUSYBOX
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine

pytestmark = pytest.mark.docker

live = pytest.mark.parametrize("private_engine", ["live"], indirect=True)
mortal = pytest.mark.parametrize("private_engine", ["mortal"], indirect=True)


@pytest.fixture
async def engine(private_engine):
    async with Engine(private_engine.url) as engine:
        yield engine


async def sleeper(engine):
    body = {
        "Image": BUSYBOX,
        "Cmd": ["sh", "-c", "echo here; exec sleep 600"],
        "StopSignal": "SIGKILL",  # an engine that comes again ends it, and waits for that
        "Labels": {labels.INSTANCE: "test"},
        "HostConfig": {"NetworkMode": "none"},
    }
    id = await engine.create(f"agent-test-{new_id()}", body)
    await engine.start(id)
    return id


@live
async def test_deaths_before_while_and_after_an_engine_was_dead_are_all_noticed(engine, private_engine):
    first, second, third = [await sleeper(engine) for _ in range(3)]
    watches = [engine.watch(id) for id in (first, second, third)]
    await engine.kill(first)
    assert (await watches[0].died).exit_code == 137
    pid = (await engine.inspect(second))["State"]["Pid"]
    await private_engine.kill()
    os.kill(pid, signal.SIGKILL)
    await private_engine.start()
    assert (await watches[1].died).exit_code == 137
    assert (await engine.inspect(third))["State"]["Running"]
    assert not watches[2].died.done()
    await engine.kill(third, "TERM")
    await engine.kill(third)
    assert (await watches[2].died).exit_code == 137


@mortal
async def test_containers_that_die_with_their_engine_are_told_of_when_it_is_there_again(
    engine, private_engine
):
    id = await sleeper(engine)
    watch = engine.watch(id)
    await private_engine.kill()
    with pytest.raises(EngineUnavailable):
        await engine.start(id)
    await private_engine.start()
    assert (await watch.died).exit_code is not None
    await engine.start(id)
    assert not engine.watch(id).died.done()


@live
async def test_questions_wait_for_an_engine_that_restarts(engine, private_engine):
    id = await sleeper(engine)
    await private_engine.kill()
    asked = asyncio.gather(engine.inspect(id), engine.stats(id), engine.containers({labels.INSTANCE: "test"}))
    await private_engine.start()
    about, usage, found = await asked
    assert (about["State"]["Running"], usage.pids, len(found)) == (True, 1, 1)


@live
async def test_output_that_cannot_be_followed_any_more_says_so(engine, private_engine):
    """The container has not ended: that must not look as if it had."""
    id = await sleeper(engine)
    lines = engine.follow_logs(id)
    assert await anext(lines) == "here"
    await private_engine.kill()
    with pytest.raises(WorkspaceUnavailable):
        await anext(lines)
    await private_engine.start()
    assert await anext(engine.follow_logs(id)) == "here"
