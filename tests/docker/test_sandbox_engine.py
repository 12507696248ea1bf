"""Sandboxes whose engine is killed and comes again: they go on, or are told of as lost, and nothing hangs."""

from __future__ import annotations

import pytest

from tests.docker.sandboxes import container, sandbox, told
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine

pytestmark = pytest.mark.docker


@pytest.fixture
async def engine(private_engine):
    async with Engine(private_engine.url) as engine:
        yield engine


@pytest.mark.parametrize("private_engine", ["live"], indirect=True)
async def test_a_sandbox_works_without_its_engine_and_is_still_watched_after_it(
    started, private_engine, engine
):
    async with started(engine=private_engine.url) as server, sandbox(server) as workspace:
        await workspace.execute("echo 1 >kept")
        first = await container(engine, workspace)
        await private_engine.kill()
        assert (await workspace.execute("cat kept")).stdout == "1\n"
        assert (await workspace.describe()).usage.memory is None
        await private_engine.start()
        assert (await workspace.describe()).usage.memory > 0
        await engine.kill(first["Id"])
        assert "SIGKILL" in (await told(workspace, ("ready", ""), ("lost", "killed"))).reason
        assert (await workspace.execute("cat kept")).stdout == "1\n"


@pytest.mark.parametrize("private_engine", ["mortal"], indirect=True)
async def test_a_sandbox_that_ends_with_its_engine_is_lost_and_replaced(started, private_engine, engine):
    async with started(engine=private_engine.url) as server, sandbox(server) as workspace:
        await workspace.execute("echo 1 >kept")
        await private_engine.kill()
        await private_engine.start()
        lost = await told(workspace, ("ready", ""), ("lost", None))
        assert lost.reason
        assert (await workspace.execute("cat kept")).stdout == "1\n"
        mine = {labels.CONVERSATION: workspace.conversation}
        assert len(await engine.containers(mine)) == 1
