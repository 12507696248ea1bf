"""A sandbox with a kernel of its own: gVisor, where the engine has it and it can be reached."""

import shutil

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.protocol.errors import IsolationUnavailable
from tests.docker.boxes import box, containers, said, sandboxes_in
from tests.docker.engine_process import EngineProcess
from workspaces.backend.docker.engine import Engine

pytestmark = pytest.mark.docker

REACHABLE = ["--network=none", "--host-uds=all", "--host-fifo=open"]


def gvisor(*arguments):
    """An engine that has it. It needs a program that is not on every machine."""
    program = shutil.which("runsc")
    if program is None:
        pytest.skip("runsc is not installed")
    return EngineProcess(runtimes={"runsc": {"path": program, "runtimeArgs": list(arguments)}})


async def test_commands_run_on_another_kernel_as_nobody_in_particular(tmp_path, box_runtime):
    async with (
        gvisor(*REACHABLE) as engine,
        sandboxes_in(tmp_path, box_runtime, engine=engine.url) as sandboxes,
        box(sandboxes, runtime="runsc") as started,
    ):
        told = await said(
            started, "cat /proc/version; id -u; ls /sys/class/net; echo > /etc/x 2>&1 || echo refused"
        )
        assert "gVisor" in told or told.startswith("Linux version 4.4.0")
        assert told.split("\n")[1:4] == ["10001", "lo", "refused"]


async def test_somebody_can_work_in_the_image_there_too_and_gains_nothing(tmp_path, box_runtime):
    async with (
        gvisor(*REACHABLE) as engine,
        sandboxes_in(tmp_path, box_runtime, engine=engine.url) as sandboxes,
        box(sandboxes, runtime="runsc", profile="task") as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        assert (await workspace.execute("echo x >/made && cat /made")).stdout == "x\n"
        for user, uid in ((None, 0), ("root", 0), ("1234", 1234)):
            found = await workspace.execute("id -u; grep ^Cap /proc/self/status", user=user)
            (said_uid, *capabilities) = found.stdout.splitlines()
            assert int(said_uid) == uid
            assert {int(line.split()[1], 16) for line in capabilities} == {0}, found
            for attempt in (
                "mount -t tmpfs none /tmp",
                "mknod /tmp/device b 254 0",
                "chown 5 /made",
                ": >/run/agent/x",
            ):
                assert (await workspace.execute(attempt, user=user)).exit_code not in (0, None), attempt


async def test_one_that_nothing_can_reach_is_refused_before_anything_starts(tmp_path, box_runtime):
    async with (
        gvisor("--network=none") as process,
        sandboxes_in(tmp_path, box_runtime, engine=process.url) as sandboxes,
    ):
        with pytest.raises(IsolationUnavailable, match="--host-uds=all and --host-fifo=open"):
            async with box(sandboxes, runtime="runsc"):
                pass
        async with Engine(process.url) as engine:
            assert await containers(engine, sandboxes) == []
