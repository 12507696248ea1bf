"""The container engine keeps what every backend promises."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from agent_sdk.ids import new_id
from tests.contract.backend import BoxContract, ServerContract
from tests.docker.images import BUSYBOX
from tests.docker.places import limited
from tests.docker.servers import SERVER
from workspaces.backend import labels as names
from workspaces.backend.contract import FOLDER, OUTPUT, RUNTIME, WORKSPACE, Machine, Mount, Storage
from workspaces.backend.docker.backend import DockerBackend
from workspaces.backend.docker.engine import Engine
from workspaces.box.runtime import box_runtime as make_runtime

pytestmark = pytest.mark.docker


class Containers:
    @pytest.fixture
    async def backend(self, engine):
        return DockerBackend(engine)

    @pytest.fixture
    def again(self):
        @asynccontextmanager
        async def opened():
            async with Engine() as engine:
                yield DockerBackend(engine)

        return opened

    @pytest.fixture
    def labels(self, instance):
        return {names.INSTANCE: instance}


class TestServers(Containers, ServerContract):
    @pytest.fixture
    def image(self):
        return SERVER


class TestBoxes(Containers, BoxContract):
    @pytest.fixture(params=["box", "task"])
    async def described(self, request, labels, folder, tmp_path, box_runtime):
        runtime = await make_runtime(box_runtime)
        for name in ("workspace", "output", "tmp"):
            (tmp_path / name).mkdir()
            (tmp_path / name).chmod(0o777)
        options = ["--folder", FOLDER, "--root", "/", "--working-dir", WORKSPACE, "--linger", "60"]
        as_user = ["--user", "root"] if request.param == "task" else []
        ready = ["--spool", OUTPUT, "--ready", f"{FOLDER}/ready", "--seccomp", "--init"]
        return Machine(
            name=f"agent-test-{new_id()}",
            labels=labels,
            profile=request.param,
            image=BUSYBOX,
            command=(*runtime.entrypoint, *options, *as_user, *ready),
            working_dir=WORKSPACE,
            env={"PATH": "/bin"},
            cpus=1.0,
            memory=256 << 20,
            pids=64,
            mounts=(
                Mount(str(tmp_path / "workspace"), WORKSPACE, here=True),
                Mount(str(folder.run), FOLDER, here=True),
                Mount(str(tmp_path / "output"), OUTPUT, here=True),
                Mount(str(tmp_path / "tmp"), "/tmp", here=True),
                Mount(str(runtime.path), RUNTIME, read_only=True, here=True),
            ),
            ports=(),
        )

    async def test_what_it_may_is_less_than_the_engine_gives_by_itself(self, engine, running, machine):
        held = (await engine.inspect(running.id))["HostConfig"]
        assert held["CapDrop"] == ["ALL"]
        assert held["NetworkMode"] == "none"
        assert held["ReadonlyRootfs"] == (machine.profile == "box")

    async def test_what_somebody_has_changed_is_a_difference(self, backend, running, machine):
        other = replace(machine, pids=63, mounts=machine.mounts[:-1])
        found = await backend.differences(running.id, other)
        assert [each.partition(":")[0] for each in found] == ["HostConfig.PidsLimit", "HostConfig.Mounts"]


async def test_a_disk_of_which_nothing_else_is_left_is_found_by_its_owner_alone(engine, instance, tmp_path):
    backend = DockerBackend(engine, disks=await limited(tmp_path))
    mine = {names.INSTANCE: instance}
    name = f"agent-test-{new_id()}"
    machine = Machine(name=name, labels=mine, image=SERVER, storage=Storage("/data", 32 << 20))
    assert "disk_limit" in backend.can
    await engine.remove(await backend.create(machine))
    (found,) = await backend.list(mine)
    assert (found.id, found.name, found.state) == (name, name, "data")
    assert name not in [each.name for each in await backend.list({names.INSTANCE: None})]
    await backend.stop(found.id)
    assert await backend.list(mine) == []
    assert not list((tmp_path / "disks").iterdir())


async def test_a_volume_of_which_nothing_else_is_left_is_found(engine, instance):
    backend, mine = DockerBackend(engine), {names.INSTANCE: instance}
    name = f"agent-test-{new_id()}"
    machine = Machine(name=name, labels=mine, image=SERVER, storage=Storage("/data"))
    await engine.remove(await backend.create(machine))
    (found,) = await backend.list(mine)
    assert (found.id, found.state) == (name, "data")
    await backend.stop(found.id)
    assert await engine.volumes(mine) == []


@pytest.mark.parametrize("size", [None, 32 << 20], ids=["volume", "disk"])
async def test_what_was_stored_under_a_former_name_is_its_machines_still(engine, instance, tmp_path, size):
    disks, mine, id = await limited(tmp_path), {names.INSTANCE: instance}, new_id()
    backend = DockerBackend(engine, disks=disks, prefix="agent-test-")
    if size is None:
        await engine.create_volume(f"agent-data-{id}", {"Labels": mine})
    else:
        await disks.make(id, size)
    (found,) = await backend.list(mine)
    assert (found.name, found.state) == (f"agent-test-{id}", "data")
    machine = Machine(name=found.name, labels=mine, image=SERVER, storage=Storage("/data", size))
    created = await backend.create(machine)
    (mount,) = (await engine.inspect(created))["Mounts"]
    assert (mount["Name"] if size is None else mount["Source"]).endswith(id)
    for _ in range(2):
        await backend.start(created)
        await backend.stop(created, keep_data=True)
    await backend.stop(found.name)
    assert await backend.list(mine) == []
    assert await engine.volumes(mine) == []
    assert not disks.owners()
