"""What the engine calls the folders of a process that runs in one of its containers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import WorkspaceUnavailable
from tests.docker.images import BUSYBOX
from tests.docker.test_docker_options import address as address
from tests.docker.test_docker_options import forwarded
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine
from workspaces.backend.docker.reach import HostPaths

pytestmark = pytest.mark.docker


@asynccontextmanager
async def process_in_a_container(engine: Engine, instance: str, **host: object):
    """The /proc folder of a process in a container."""
    body = {
        "Image": BUSYBOX,
        "Cmd": ["sleep", "100"],
        "Labels": {labels.INSTANCE: instance},
        "HostConfig": {"NetworkMode": "none", **host},
    }
    id = await engine.create(f"agent-test-{new_id()}", body)
    try:
        await engine.start(id)
        yield Path(f"/proc/{(await engine.inspect(id))['State']['Pid']}")
    finally:
        await engine.remove(id)


async def test_outside_of_containers_paths_are_what_they_are(engine, tmp_path):
    paths = await HostPaths.find(engine)
    assert not paths.unseen
    assert paths.of(tmp_path / "boxes") == f"{tmp_path}/boxes"


async def test_an_engine_of_another_machine_sees_nothing_that_is_mounted_here(address):
    async with forwarded(address) as url, Engine(url) as elsewhere:
        told = f"the engine at {url} is on another machine" if address != "127.0.0.1" else ""
        assert (await HostPaths.find(elsewhere)).unseen == told


async def test_a_folder_that_is_mounted_in_has_the_name_it_has_outside(engine, instance, tmp_path):
    outside = tmp_path / "agent data"
    outside.mkdir()
    async with process_in_a_container(engine, instance, Binds=[f"{outside}:/data"]) as process:
        paths = await HostPaths.find(engine, process=process)
    assert "runs in a container" in paths.unseen
    assert paths.of(Path("/data/boxes/one/run")) == f"{outside}/boxes/one/run"
    assert paths.of(Path("/data")) == str(outside)


async def test_a_volume_is_where_the_engine_keeps_it(engine, instance):
    volume = f"agent-test-{new_id()}"
    await engine.create_volume(volume, {"Labels": {labels.INSTANCE: instance}})
    async with process_in_a_container(engine, instance, Binds=[f"{volume}:/data"]) as process:
        paths = await HostPaths.find(engine, process=process)
    (known,) = await engine.volumes({labels.INSTANCE: instance})
    assert paths.of(Path("/data/boxes")) == f"{known['Mountpoint']}/boxes"
    await engine.remove_volume(volume)


async def test_the_innermost_mount_counts(engine, instance, tmp_path):
    for name in ("data", "boxes"):
        (tmp_path / name).mkdir()
    binds = [f"{tmp_path}/data:/data", f"{tmp_path}/boxes:/data/boxes"]
    async with process_in_a_container(engine, instance, Binds=binds) as process:
        paths = await HostPaths.find(engine, process=process)
    assert paths.of(Path("/data/boxes/one")) == f"{tmp_path}/boxes/one"
    assert paths.of(Path("/data/boxes-of-others")) == f"{tmp_path}/data/boxes-of-others"


async def test_a_folder_that_only_the_container_has_is_refused_with_what_to_do(engine, instance):
    async with process_in_a_container(engine, instance) as process:
        paths = await HostPaths.find(engine, process=process)
    with pytest.raises(
        WorkspaceUnavailable, match="/data/boxes is not on a volume .* mount a volume"
    ) as refused:
        paths.of(Path("/data/boxes"))
    assert refused.value.details["phase"] == "create"


async def test_a_container_of_its_own_network_and_names_is_found_as_well(engine, instance, tmp_path):
    """With the network of the machine it has the name of the machine, too."""
    async with process_in_a_container(
        engine, instance, NetworkMode="host", Binds=[f"{tmp_path}:/data"]
    ) as process:
        assert (await HostPaths.find(engine, process=process)).of(Path("/data")) == str(tmp_path)
