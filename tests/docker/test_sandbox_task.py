"""Sandboxes in which somebody works in the image itself, where a server allows it: what is open, what stays locked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable, PolicyDenied, WorkspaceUnavailable
from tests.docker.boxes import box, sandboxes_in
from tests.docker.engine_process import EngineProcess
from tests.docker.images import BUSYBOX, FULL
from tests.docker.sandboxes import container, sandbox
from tests.docker.test_sandbox_images import image as image
from workspaces.box.folder import BoxFolder

pytestmark = pytest.mark.docker

PROJECT = (
    "RUN mkdir /testbed && cd /testbed && git init -q && echo 1 >file && git add . "
    "&& git -c user.name=x -c user.email=x@x commit -qm x && chmod -R go-w /testbed"
)
STATUS = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr -d '[:blank:]'"
LOCKED = [
    *(f"Cap{name}:{0:016x}" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")),
    "NoNewPrivs:1",
    "Seccomp:2",
]


@pytest.fixture
async def tasks(started, engine, tmp_path):
    async with started(sandbox_profiles=("locked", "task")) as server:
        yield server


async def test_commands_work_in_the_image_as_its_user_where_it_says(tasks, engine, image, tmp_path):
    odd = image(PROJECT, "WORKDIR /testbed", base=FULL)
    async with sandbox(tasks, odd, profile="task") as workspace:
        done = await workspace.execute(
            "pwd; id -un; echo $HOME; echo 2 >file; git commit -qam second && git rev-list --count HEAD; "
            "touch /usr/bin/made /etc/made && echo writable"
        )
        assert done.stdout.split() == ["/testbed", "root", "/root", "2", "writable"], done.stderr
        await workspace.files.write("/testbed/new", b"written")
        assert await workspace.files.read("/testbed/file") == b"2\n"
        (tmp_path / "up").write_text("up")
        await workspace.upload(tmp_path / "up", "/opt/up")
        assert (await workspace.execute("cat new /opt/up")).stdout == "writtenup"
        info = await workspace.describe()
        assert (info.sandbox, info.root_quota, info.working_dir) == ("task", "none", "/testbed")
        assert not info.profile.read_only_root


async def test_whoever_commands_are_every_other_lock_stays_on(tasks, engine, tmp_path):
    async with sandbox(tasks, FULL, profile="task") as workspace:
        for user in (None, "root", "nobody", "daemon:games", "1234"):
            status = await workspace.execute(STATUS, user=user)
            assert status.stdout.split() == LOCKED, (user, status)
        held = (await container(engine, workspace))["HostConfig"]
        assert held["CapDrop"] == ["ALL"]
        assert held["NetworkMode"] == "none"
        box = (await workspace.describe()).pid
        run = BoxFolder(tmp_path / "data" / "boxes" / workspace.conversation).run
        for attempt in (
            f"cat /proc/{box}/environ",
            f": </proc/{box}/mem",
            "touch /run/agent/x",
            "chmod 777 /run/agent",
            "rm /run/agent/box.sock",
            "touch /opt/agent/x",
            "mount -t tmpfs none /mnt",
            "chown nobody /etc/passwd",
            "mknod /tmp/device b 254 0",
        ):
            for user in (None, "nobody"):
                assert (await workspace.execute(attempt, user=user)).exit_code not in (0, None), (
                    attempt,
                    user,
                )
        assert [path.name for path in run.iterdir()] == ["box.sock"]


async def test_a_command_runs_as_whom_its_caller_says_and_ends_with_what_it_started(tasks):
    async with sandbox(tasks, FULL, profile="task") as workspace:
        command = "id -un; id -gn; echo $HOME $USER; touch /tmp/mine && stat -c %U /tmp/mine; rm -f /tmp/mine"
        assert (await workspace.execute(command, user="games")).stdout.split() == [
            *("games", "games", "/usr/games", "games", "games")
        ]
        assert (await workspace.execute("id -u", user="4000")).stdout == "4000\n"
        process = await workspace.start("tty; id -un; exec sleep 600", user="nobody", pty=True)
        said = b""
        async for data in process.output():
            said += data
            if b"nobody" in said:
                break
        assert said.startswith(b"/dev/pts/")
        await process.signal("TERM")
        assert (await process.wait()).signal == 15
        late = await workspace.execute("sleep 600 & sleep 600", user="nobody", timeout=0.5)
        assert late.timed_out
        assert (await workspace.execute("pgrep -c sleep")).stdout == "0\n"


@pytest.mark.parametrize(("user", "name"), [(None, "worker"), ("root", "root"), ("12345", "agent")])
async def test_the_user_is_the_images_unless_another_one_is_asked_for(tasks, image, user, name):
    odd = image(
        "RUN useradd -m worker && echo x >/home/worker/x && chown worker /home/worker/x",
        "USER worker",
        base=FULL,
    )
    async with sandbox(tasks, odd, profile="task", user=user) as workspace:
        assert (await workspace.execute("whoami; touch /workspace/x /tmp/x && echo made")).stdout.split() == [
            name,
            "made",
        ]
        changed = await workspace.execute("echo y >/home/worker/x")
        assert (changed.exit_code == 0) == (user is None)
        with pytest.raises(Exception, match="no user"):
            await workspace.execute("true", user="nonesuch")


async def test_a_user_that_the_image_has_not_is_refused_in_one_sentence(tasks):
    async with sandbox(tasks, FULL, profile="task", user="nonesuch") as workspace:
        with pytest.raises(WorkspaceUnavailable, match="there is no user 'nonesuch' in /etc/passwd"):
            await workspace.execute("true")


async def test_a_user_whose_number_is_longer_than_any_is_not_there(tasks, image):
    odd = image(f"RUN echo 'huge:x:{'9' * 5000}:0::/:/bin/sh' >>/etc/passwd", base=FULL)
    async with sandbox(tasks, odd, profile="task") as workspace:
        with pytest.raises(InvalidParams, match="there is no user 'huge' in /etc/passwd"):
            await workspace.execute("true", user="huge")


async def test_a_task_outlives_its_server_with_all_it_has_written(started, image, engine):
    conversation = None
    for _ in range(2):
        async with started(sandbox_profiles=("task",), idle_seconds=1.0, boxes_on_stop="keep") as server:
            if conversation is None:
                async with sandbox(server, FULL, profile="task") as workspace:
                    await workspace.execute("echo kept >/etc/kept")
                    conversation = workspace.conversation
            else:
                async with RemoteWorkspace(server.url, server.key, conversation=conversation) as workspace:
                    assert (await workspace.execute("cat /etc/kept")).stdout == "kept\n"
                    for found in await engine.containers({"io.agentserver.conversation": conversation}):
                        await engine.remove(found["Id"])


def engine_on(kind):
    """An engine that keeps everything on a file system of this kind, where there can be one."""
    if shutil.which(f"mkfs.{kind}") is None or kind not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"needs {kind}, and mkfs.{kind}")
    return EngineProcess(disk=kind)


@pytest.mark.parametrize("user", ["root", "1234"])
async def test_the_root_is_as_small_as_the_workspace_where_the_engine_can_limit_it(
    tmp_path, box_runtime, user
):
    async with (
        engine_on("btrfs") as engine,
        sandboxes_in(tmp_path, box_runtime, engine=engine.url) as sandboxes,
        box(sandboxes, profile="task", disk="32m") as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        assert (await started.completed(await workspace.describe())).root_quota == "btrfs"
        begun = "mkdir -m 777 /mine && dd if=/dev/zero of=/there bs=1M count=8 conv=fsync && echo 8m"
        assert (await workspace.execute(begun)).stdout == "8m\n"
        fill = "dd if=/dev/zero of=/mine/x bs=1M count=64 conv=fsync; du -k /mine/x | cut -f 1"
        filled = await workspace.execute(fill, user=user)
        assert "quota exceeded" in filled.stderr
        (kilobytes,) = filled.stdout.split()
        assert int(kilobytes) <= 24 << 10


async def test_a_root_that_the_engine_cannot_limit_after_all_is_told_to_have_no_limit(tmp_path, box_runtime):
    async with (
        engine_on("xfs") as engine,  # without pquota, which only trying tells
        sandboxes_in(tmp_path, box_runtime, engine=engine.url) as sandboxes,
        box(sandboxes, profile="task", disk="32m") as started,
        RemoteWorkspace(started.url, started.token) as workspace,
    ):
        assert (await sandboxes.host.backend()).root_limit
        assert (await started.completed(await workspace.describe())).root_quota == "none"
        filled = await workspace.execute("dd if=/dev/zero of=/x bs=1M count=48 && echo more")
        assert filled.stdout == "more\n"


async def test_an_image_without_any_users_has_root(tasks):
    async with sandbox(tasks, BUSYBOX, profile="task") as workspace:
        for user in (None, "root", "0"):
            said = (
                await workspace.execute("id -un; id -u; echo $HOME $USER; echo x >/made", user=user)
            ).stdout
            assert said.split() == ["root", "0", "/", "root"], user


async def test_no_server_allows_it_by_itself_and_no_other_sandbox_changes_users(server):
    with pytest.raises(PolicyDenied, match="sandbox_profiles"):
        async with sandbox(server, FULL, profile="task"):
            pass
    async with sandbox(server, FULL) as workspace:
        with pytest.raises(IsolationUnavailable, match='profile="task"'):
            await workspace.execute("true", user="root")
        assert (await workspace.execute("id -u", user="agent")).stdout == "10001\n"
