"""The engine as callers use it: containers made, run, watched and removed on a real one."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    ImageUnavailable,
    IsolationUnavailable,
    NotFound,
    WorkspaceUnavailable,
)
from tests.docker.images import BUSYBOX
from workspaces.backend import labels
from workspaces.backend.docker.engine import Engine

pytestmark = pytest.mark.docker


def body(instance, *command, **host):
    return {
        "Image": BUSYBOX,
        "Cmd": list(command) or ["sleep", "100"],
        "Labels": {labels.INSTANCE: instance},
        "ExposedPorts": {"80/tcp": {}},
        "HostConfig": {"NetworkMode": "none", **host},
    }


@asynccontextmanager
async def container(engine, instance, *command, **host):
    id = await engine.create(f"agent-test-{new_id()}", body(instance, *command, **host))
    try:
        yield id
    finally:
        await engine.remove(id)


async def refusal(engine, instance, name=None, platform=None, image=None, **host):
    """How the engine refuses to make such a container, or to start it."""
    about = body(instance, **host)
    about["Image"] = image or BUSYBOX
    with pytest.raises(WorkspaceUnavailable) as refused:
        id = await engine.create(name or f"agent-test-{new_id()}", about, platform=platform)
        try:
            await engine.start(id)
        finally:
            await engine.remove(id)
    return refused.value


async def test_it_says_what_it_is(engine):
    info = engine.info
    assert (info.os, info.api) >= ("linux", "1.40")
    assert "runc" in info.runtimes
    assert info.cpus > 0 and info.memory > 0 and info.clock > 0


async def test_a_container_lives_from_its_creation_to_its_removal(engine, instance):
    async with container(engine, instance) as id:
        assert (await engine.inspect(id))["State"]["Status"] == "created"
        await engine.start(id)
        assert (await engine.inspect(id))["State"]["Running"]
        await engine.stop(id, 0)
        assert not (await engine.inspect(id))["State"]["Running"]
        (found,) = await engine.containers({labels.INSTANCE: instance})
        assert found["Id"] == id
    assert await engine.containers({labels.INSTANCE: instance}) == []


async def test_what_is_gone_may_be_ended_again(engine, instance):
    async with container(engine, instance) as id:
        await engine.start(id)
        await engine.kill(id)
        await engine.kill(id)
        await engine.stop(id)
    for end in (engine.stop, engine.kill, engine.remove):
        await end(id)
    with pytest.raises(NotFound, match="No such container"):
        await engine.inspect(id)
    with pytest.raises(NotFound):
        await engine.start(id)


async def test_a_container_is_removed_once_however_many_remove_it(engine, instance):
    async with container(engine, instance) as id:
        await engine.start(id)
        await asyncio.gather(*(engine.remove(id) for _ in range(4)))
        assert await engine.containers({labels.INSTANCE: instance}) == []


async def test_a_paused_container_is_told_of_goes_on_and_can_be_removed(engine, instance):
    async with container(engine, instance) as id:
        await engine.start(id)
        seen = []
        with engine.happenings() as queue:
            await engine.pause(id)
            await engine.pause(id)
            await engine.unpause(id)
            await engine.unpause(id)
            while seen[-1:] != ["unpause"]:
                happened = await queue.get()
                if happened is not None and happened.id == id:
                    seen.append(happened.what)
        assert [what for what in seen if what.endswith("pause")] == ["pause", "unpause"]
        await engine.pause(id)


async def test_a_death_comes_with_its_exit_code(engine, instance):
    async with container(engine, instance, "sh", "-c", "exit 3") as id:
        watch = engine.watch(id)
        await engine.start(id)
        death = await watch.died
    assert (death.exit_code, death.cause, death.reason) == (3, "exit", "it ended with exit code 3")


async def test_a_death_before_anybody_watched_is_noticed(engine, instance):
    async with container(engine, instance) as id:
        await engine.start(id)
        await engine.kill(id)
        assert (await engine.watch(id).died).exit_code == 137
        await engine.remove(id)
        assert (await engine.watch(id).died).reason == "it was removed"


async def test_a_removal_is_a_death(engine, instance):
    async with container(engine, instance) as id:
        await engine.start(id)
        watch = engine.watch(id)
        await engine.remove(id)
        assert (await watch.died).exit_code in (None, 137)


async def test_a_container_killed_for_its_memory_says_so(engine, instance):
    hog = "a=x; while true; do a=$a$a; done"
    limits = {"Memory": 16 << 20, "MemorySwap": 16 << 20}
    async with container(engine, instance, "sh", "-c", hog, **limits) as id:
        watch = engine.watch(id)
        await engine.start(id)
        death = await watch.died
    assert death.cause == "oom", death
    assert death.reason == "it used more memory than it may and was killed"


async def test_a_closed_watch_learns_nothing(engine, instance):
    async with container(engine, instance) as id:
        await engine.start(id)
        closed, open_ = engine.watch(id), engine.watch(id)
        closed.close()
        closed.close()
        await engine.kill(id)
        await open_.died
        assert not closed.died.done()


async def test_its_output_is_followed_line_by_line_to_the_end(engine, instance):
    async with container(
        engine, instance, "sh", "-c", "for i in 1 2 3; do echo line $i; done; echo end"
    ) as id:
        await engine.start(id)
        lines = [line async for line in engine.follow_logs(id)]
        assert lines == ["line 1", "line 2", "line 3", "end"]
        assert await engine.logs(id, 2) == "line 3\nend"
    assert await engine.logs(id) == ""


async def test_bytes_that_are_no_text_are_shown_as_such(engine, instance):
    async with container(
        engine, instance, "sh", "-c", r"printf 'a\377b\n'; head -c 200000 /dev/zero; echo"
    ) as id:
        await engine.start(id)
        lines = [line async for line in engine.follow_logs(id)]
    assert lines[0] == "a\N{REPLACEMENT CHARACTER}b"
    assert sum(map(len, lines[1:])) == 200_000


async def test_what_a_container_uses_is_counted(engine, instance):
    says = ("sh", "-c", "echo up; exec sleep 1000")
    async with container(engine, instance, *says, Memory=64 << 20, PidsLimit=50) as id:
        assert (await engine.stats(id)).memory is None
        await engine.start(id)
        # Before its first word, the program that starts containers is still in there.
        async for _ in engine.follow_logs(id):
            break
        usage = await engine.stats(id)
    assert (usage.memory_max, usage.pids, usage.pids_max) == (64 << 20, 1, 50)
    assert usage.memory and usage.cpu_seconds


async def test_volumes_are_made_found_and_removed(engine, instance):
    name, mine = f"agent-test-{instance}", {labels.INSTANCE: instance}
    await engine.create_volume(name, {"Labels": mine})
    (volume,) = await engine.volumes(mine)
    assert volume["Name"] == name
    for _ in range(2):
        await engine.remove_volume(name)
    assert await engine.volumes(mine) == []


async def test_a_creation_cancelled_at_any_moment_leaves_no_container(instance):
    async with Engine() as engine:
        for steps in range(0, 60, 6):
            create = asyncio.ensure_future(engine.create(f"agent-test-{new_id()}", body(instance)))
            for _ in range(steps):
                await asyncio.sleep(0)
            if not create.cancel():  # a slow machine lets it come through in so many steps
                await engine.remove(await create)
                continue
            with pytest.raises(asyncio.CancelledError):
                await create


async def test_many_starts_at_once_all_succeed(engine, instance):
    async def one():
        async with container(engine, instance, "true") as id:
            watch = engine.watch(id)
            await engine.start(id)
            return (await watch.died).exit_code

    assert await asyncio.gather(*(one() for _ in range(12))) == [0] * 12


@pytest.mark.parametrize(
    ("given", "kind", "phase", "says"),
    [
        ({"image": "agent-test/nonesuch:1"}, ImageUnavailable, "create", "No such image"),
        ({"image": "UPPER CASE"}, ImageUnavailable, "create", "correct its name"),
        ({"platform": "linux/s390x"}, ImageUnavailable, "create", "another platform"),
        ({"Runtime": "nonesuch"}, IsolationUnavailable, "create", "install the runtime"),
        ({"StorageOpt": {"size": "1g"}}, IsolationUnavailable, "create", "leave out the size"),
        ({"Memory": 1000}, WorkspaceUnavailable, "create", "give it more memory"),
        ({"Binds": ["/nonesuch/folder:/in:ro,nonsense"]}, WorkspaceUnavailable, "create", "/host:/inside"),
        (
            {"Mounts": [{"Type": "bind", "Source": "/nonesuch", "Target": "/in"}]},
            WorkspaceUnavailable,
            "create",
            "make the folder",
        ),
        ({"NetworkMode": "nonesuch"}, WorkspaceUnavailable, "start", "make the network"),
        (
            {"DeviceRequests": [{"Count": -1, "Capabilities": [["gpu"]]}]},
            IsolationUnavailable,
            "start",
            "without GPUs",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_what_it_cannot_do_is_refused_with_a_mend_and_leaves_nothing(
    engine, instance, given, kind, phase, says
):
    refused = await refusal(engine, instance, **given)
    assert (type(refused), refused.details["phase"]) == (kind, phase), refused
    assert says in str(refused)
    assert "\n" not in str(refused)


async def test_a_command_that_is_not_there_is_refused(engine, instance):
    async with container(engine, instance, "/nonesuch") as id:
        with pytest.raises(WorkspaceUnavailable, match="/nonesuch: no such file.*correct the command"):
            await engine.start(id)


async def test_a_name_that_is_taken_is_refused_and_its_container_stays(engine, instance):
    name = f"agent-test-{new_id()}"
    id = await engine.create(name, body(instance))
    refused = await refusal(engine, instance, name)
    assert "choose another name" in str(refused)
    assert (await engine.inspect(name))["Id"] == id
    await engine.remove(id)


async def test_a_port_that_is_taken_is_refused(engine, instance):
    ports = {"NetworkMode": "bridge", "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "0"}]}}
    async with container(engine, instance, **ports) as id:
        await engine.start(id)
        (binding,) = (await engine.inspect(id))["NetworkSettings"]["Ports"]["80/tcp"]
        ports["PortBindings"]["80/tcp"] = [{"HostIp": "127.0.0.1", "HostPort": binding["HostPort"]}]
        refused = await refusal(engine, instance, **ports)
    assert "stop what uses the port" in str(refused), refused
