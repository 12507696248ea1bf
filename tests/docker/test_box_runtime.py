"""The box runtime: made once, and enough for images that have nothing."""

from __future__ import annotations

import asyncio

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from tests.docker.boxes import box
from tests.docker.images import BARE, BUSYBOX, FULL
from tests.server.wire import GUARD
from workspaces.backend import labels
from workspaces.box.runtime import MOUNT
from workspaces.box.runtime import box_runtime as make_runtime

pytestmark = pytest.mark.docker

IMAGES = [BUSYBOX, BARE, FULL]


@pytest.fixture(params=IMAGES)
async def workspace(request, opened):
    async with (
        opened() as sandboxes,
        box(sandboxes, image=request.param) as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        yield workspace


async def test_text_runs_in_bash_whether_the_image_has_one_or_not(workspace):
    result = await workspace.execute("a=(1 2 3); echo ${#a[@]} $0; false | true; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == ("3 bash\n1\n", "")


async def test_what_the_shell_says_of_itself_is_as_everywhere(workspace):
    assert (
        await workspace.execute("no-such-program")
    ).stderr == "bash: line 1: no-such-program: command not found\n"


async def test_a_shell_keeps_its_state(workspace):
    shell = workspace.shell()
    await shell.run("cd /tmp; x=1; f() { echo f$x; }")
    answer = await shell.run("f; pwd")
    assert (answer.output.text, answer.cwd) == ("f1\n/tmp\n", "/tmp")


async def test_a_program_gets_a_terminal(workspace):
    process = await workspace.start(["sh", "-c", "test -t 0 && test -t 1 && echo terminal"], pty=True)
    assert (await process.wait()).exit_code == 0
    assert await anext(process.output()) == b"terminal\r\n"


async def test_nothing_of_the_runtime_is_in_the_environment_of_commands(workspace):
    environment = (await workspace.execute("env")).stdout
    assert not [line for line in environment.splitlines() if line.startswith(("LD_", "PYTHON"))]
    assert "/opt/agent" not in environment


async def test_the_runtime_cannot_be_changed(workspace):
    result = await workspace.execute("echo x > /opt/agent/bin/python3; echo x > /opt/agent/new")
    assert result.exit_code != 0
    assert result.stderr.count("Read-only file system") == 2


async def test_commands_may_write_to_the_temporary_folder(workspace):
    assert (await workspace.execute("echo x > /tmp/f && cat /tmp/f")).stdout == "x\n"


async def test_relative_paths_are_below_the_working_folder(workspace):
    await workspace.files.write("in/data.bin", b"x")
    assert (await workspace.execute("cat /workspace/in/data.bin")).stdout == "x"
    assert [info.path for info in await workspace.files.list()] == ["in"]


@pytest.mark.parametrize("path", ["/proc/1/environ", "/proc/self/mem", "/sys/kernel/notes", "/dev/zero"])
async def test_what_only_looks_like_a_file_does_not_leave_it(opened, path, tmp_path):
    async with (
        opened() as sandboxes,
        box(sandboxes) as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        with pytest.raises(OSError, match="not a regular file"):
            await workspace.download(path, tmp_path / "copy")


async def test_an_idle_box_takes_little_memory(opened):
    async with (
        opened() as sandboxes,
        box(sandboxes) as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        pid = (await workspace.describe()).pid
        status = (await workspace.execute(["cat", f"/proc/{pid}/status"])).stdout
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    assert int(resident) < 28 << 10


async def test_no_library_of_the_image_gets_into_a_box(engine, instance, box_runtime, tmp_path):
    runtime = await make_runtime(box_runtime)
    (tmp_path / "preload").write_text("/evil.so\n")
    body = {
        "Image": BUSYBOX,
        "Entrypoint": [*runtime.python(MOUNT), "-m", "agent_sdk.box", "--help"],
        "Labels": {labels.INSTANCE: instance},
        "HostConfig": {
            "NetworkMode": "none",
            "Binds": [f"{runtime.path}:{MOUNT}:ro", f"{tmp_path / 'preload'}:/etc/ld.so.preload:ro"],
        },
    }
    id = await engine.create(f"agent-box-{new_id()}", body)
    watch = engine.watch(id)
    await engine.start(id)
    async with asyncio.timeout(GUARD):
        assert (await watch.died).exit_code == 0
    watch.close()
    said = await engine.logs(id, lines=200)
    assert "usage: agent_sdk.box" in said
    assert "evil" not in said
    await engine.remove(id)


async def test_a_runtime_is_made_once_however_many_want_it(tmp_path):
    made = await asyncio.gather(*(make_runtime(tmp_path) for _ in range(3)))
    assert len({runtime.path for runtime in made}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {made[0].path.name, "lock"}
    assert made[0].size < 60 << 20


async def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "new-half").mkdir()
    (tmp_path / "new-half/file").touch()
    await make_runtime(tmp_path)
    assert not (tmp_path / "new-half").exists()
