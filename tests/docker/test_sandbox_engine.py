"""Sandboxes whose engine is killed and comes again: they go on, or are told of as lost, and nothing hangs."""

from __future__ import annotations

import asyncio

import pytest

from agent_sdk.protocol.errors import ImageUnavailable, NotFound, WorkspaceUnavailable
from tests.docker.boxes import box, sandboxes_in
from tests.docker.sandboxes import container, sandbox, told
from tests.server.wire import GUARD
from workspaces.backend import labels
from workspaces.backend.contract import Image
from workspaces.backend.docker.engine import Engine
from workspaces.box.host import MOST_IMAGES

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


async def test_a_box_whose_container_has_ended_or_is_gone_cannot_be_frozen(opened):
    async with opened() as sandboxes, box(sandboxes) as dead, Engine() as usual:
        container = sandboxes.recorded("one").container
        await usual.kill(container)
        await dead.ended
        with pytest.raises(WorkspaceUnavailable, match="the sandbox has ended, so it cannot be paused"):
            await dead.freeze()
        await usual.remove(container)
        with pytest.raises(NotFound):
            await dead.freeze()


async def test_a_box_that_was_frozen_and_thawed_twice_hears_of_others_who_do_it(opened):
    async with opened() as sandboxes, box(sandboxes) as frozen, Engine() as usual:
        heard: asyncio.Queue[bool] = asyncio.Queue()
        frozen.follow(heard.put_nowait)
        for verb in (frozen.freeze, frozen.freeze, frozen.thaw, frozen.thaw):
            await verb()
        container = sandboxes.recorded("one").container
        async with asyncio.timeout(GUARD):
            await usual.pause(container)
            assert await heard.get() is True
            await usual.unpause(container)
            assert await heard.get() is False
        assert heard.empty()


async def test_no_more_images_are_remembered_because_nothing_can_be_made_of_them(opened):
    async with opened() as sandboxes:
        for number in range(MOST_IMAGES + 2):
            with pytest.raises(ImageUnavailable):
                await sandboxes.host.accounts(Image(name="none", id=f"sha256:{number:064}"))
        assert len(sandboxes.host._accounts) <= MOST_IMAGES


@pytest.mark.parametrize("private_engine", ["live"], indirect=True)
async def test_a_box_that_could_not_be_killed_without_its_engine_is_killed_with_it(
    tmp_path, box_runtime, private_engine
):
    async with (
        sandboxes_in(tmp_path, box_runtime, engine=private_engine.url, disk=None) as sandboxes,
        box(sandboxes) as hanging,
    ):
        await private_engine.kill()
        hanging.kill()
        await hanging._killing
        await private_engine.start()
        hanging.kill()
        await hanging.ended
        assert hanging.cause == "killed"
