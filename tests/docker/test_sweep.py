"""What is swept: all of ours that nobody has on record, of others what is over, of strangers nothing."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from agent_sdk.ids import new_id
from tests.docker.images import BUSYBOX
from workspaces.backend import labels
from workspaces.backend.docker.backend import DATA, DockerBackend
from workspaces.backend.docker.engine import Engine
from workspaces.backend.sweep import Sweep

pytestmark = pytest.mark.docker

LONG_AGO = int(time.time()) - 86_400


def name() -> str:
    return f"agent-test-{new_id()}"


def body(marks: dict[str, str], mounts: list[str] | None = None) -> dict[str, object]:
    host = {"NetworkMode": "none", "Binds": mounts or []}
    return {"Image": BUSYBOX, "Cmd": ["sleep", "100"], "Labels": marks, "HostConfig": host}


async def states(engine: Engine, instance: str) -> dict[str, str]:
    found = await engine.containers({labels.INSTANCE: instance})
    return {container["Names"][0].lstrip("/"): container["State"] for container in found}


class Told:
    """What a sweep tells of."""

    def __init__(self):
        self.removed = []
        self.problems = []
        self.more = asyncio.Event()

    def sweep(self, engine, instance, owned=(), **options):
        return Sweep(
            DockerBackend(engine),
            {labels.INSTANCE: instance},
            lambda: owned,
            on_removed=self.remove,
            on_problem=self.problems.append,
            **options,
        )

    def remove(self, name):
        self.removed.append(name)
        self.more.set()


async def test_what_nobody_has_on_record_is_removed_in_whatever_state_it_is(engine, instance):
    mine = {labels.INSTANCE: instance}
    running, paused, created, owned = (name() for _ in range(4))
    for each in (running, paused, owned):
        await engine.start(await engine.create(each, body(mine)))
    await engine.pause(paused)
    await engine.create(created, body(mine))
    told = Told()
    await told.sweep(engine, instance, {owned}).once()
    assert await states(engine, instance) == {owned: "running"}
    assert sorted(told.removed) == sorted((running, paused, created))
    await told.sweep(engine, instance).once()
    assert await states(engine, instance) == {}


async def test_what_a_machine_has_stored_goes_with_it_and_also_when_nothing_else_is_left(engine, instance):
    mine = {labels.INSTANCE: instance}
    whole, rest = name(), name()
    for each in (whole, rest):
        await engine.create_volume(f"{each}{DATA}", {"Labels": mine})
    await engine.start(await engine.create(whole, body(mine, [f"{whole}{DATA}:/data"])))
    told = Told()
    await told.sweep(engine, instance, {whole, rest}).once()
    assert told.removed == []
    await told.sweep(engine, instance).once()
    assert sorted(told.removed) == sorted([whole, rest])
    assert await engine.volumes(mine) == []


async def test_of_others_only_what_is_over_and_does_not_run_is_removed(private_engine):
    """On an engine that nobody else sweeps: what is over and has not started yet is anybody's."""
    other = new_id()

    def marks(expires: object) -> dict[str, str]:
        return {labels.INSTANCE: other, labels.EXPIRES: str(expires)}

    over, runs, comes_back, never, odd, endless = (name() for _ in range(6))
    async with Engine(private_engine.url) as engine:
        await engine.create(over, body(marks(LONG_AGO)))
        await engine.start(await engine.create(runs, body(marks(LONG_AGO))))
        await engine.create(comes_back, body(marks(int(time.time()) + 3600)))
        await engine.create(never, body({labels.INSTANCE: other}))
        await engine.create(odd, body(marks("-1 or so")))
        await engine.create(endless, body(marks("9" * 5000)))
        await Told().sweep(engine, new_id()).once()
        assert await states(engine, other) == {
            runs: "running",
            **dict.fromkeys((comes_back, never, odd, endless), "created"),
        }


async def test_strangers_are_never_touched(engine, instance):
    """Not those with names like ours, and not those with one label of ours that proves nothing."""
    strangers = {
        f"agent-box-{new_id()}": {},
        name(): {labels.EXPIRES: str(LONG_AGO)},
        name(): {"io.agentserver.instances": instance, labels.EXPIRES: str(LONG_AGO)},
        name(): {labels.CONVERSATION: new_id(), labels.ROLE: labels.BOX},
    }
    ids = [await engine.create(each, body(marks)) for each, marks in strangers.items()]
    try:
        told = Told()
        await told.sweep(engine, instance).once()
        assert [(await engine.inspect(id))["State"]["Status"] for id in ids] == ["created"] * len(ids)
    finally:
        for id in ids:
            await engine.remove(id)


async def test_it_sweeps_when_it_begins_and_again_and_again(engine, instance):
    mine = {labels.INSTANCE: instance}
    told = Told()
    await engine.create(name(), body(mine))
    async with told.sweep(engine, instance, every=0.05):
        assert len(told.removed) == 1
        for _ in range(2):
            told.more.clear()
            await engine.create(name(), body(mine))
            async with asyncio.timeout(30):
                await told.more.wait()
    assert await states(engine, instance) == {}


@asynccontextmanager
async def on_the_way(engine: Engine, place: Path) -> AsyncIterator[str]:
    """Another socket of the engine, which goes away at the end of the block with all connections."""

    async def pass_on(reader, writer):
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        finally:
            writer.close()

    async def meet(reader, writer):
        there, back = await asyncio.open_unix_connection(engine.where.removeprefix("unix://"))
        ways.append(asyncio.gather(pass_on(reader, back), pass_on(there, writer)))

    ways = []
    async with await asyncio.start_unix_server(meet, place):
        yield f"unix://{place}"
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
    place.unlink()


async def test_an_engine_that_goes_away_is_told_of_and_swept_when_it_is_back(engine, instance, tmp_path):
    told = Told()
    async with AsyncExitStack() as stack:
        async with on_the_way(engine, tmp_path / "engine.sock") as url:
            gone = await stack.enter_async_context(Engine(url))
        sweep = told.sweep(gone, instance)
        await stack.enter_async_context(sweep)
        assert len(told.problems) == 1
        await engine.create(name(), body({labels.INSTANCE: instance}))
        async with on_the_way(engine, tmp_path / "engine.sock"):
            await sweep.once()
        assert len(told.removed) == 1


async def test_a_container_of_an_image_that_was_made_of_ours_is_a_strangers(engine, instance):
    mine = {labels.INSTANCE: instance, labels.ROLE: labels.BOX}
    ours, theirs, image = name(), name(), f"agent-test/committed:{new_id()}"
    id = await engine.create(ours, body(mine))
    try:
        for command in (["commit", id, image], ["create", "--name", theirs, image]):
            await asyncio.to_thread(subprocess.run, ["docker", *command], check=True, capture_output=True)
        told = Told()
        async with told.sweep(engine, instance):
            assert told.removed == [ours]
            assert len(await engine.containers({}, name=theirs)) == 1
    finally:
        for command in (["rm", "-f", theirs], ["rmi", image]):
            await asyncio.to_thread(subprocess.run, ["docker", *command], capture_output=True)
