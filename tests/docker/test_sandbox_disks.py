"""The workspaces of sandboxes as their commands have them: limited, kept, copied; and gone when they are forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_sdk import Sandbox
from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable
from tests.docker.boxes import box, said
from tests.docker.images import BUSYBOX

pytestmark = pytest.mark.docker


@pytest.fixture
async def sandboxes(opened):
    async with opened() as sandboxes:
        await sandboxes.host.backend()
        if sandboxes.host.disks.mechanism == "none":
            pytest.skip("this machine cannot limit a workspace")
        yield sandboxes


PLACES = ("disks", "mounts", "workspaces")


def left_in(folder: Path) -> list[str]:
    around = (folder, folder / "spools", folder / "temporary")
    return [str(path) for place in around for name in PLACES for path in (place / name).iterdir()]


async def test_commands_cannot_write_more_than_the_workspace_may_hold(sandboxes):
    async with box(sandboxes, disk="32m") as limited:
        filled = await said(
            limited, "dd if=/dev/zero of=big bs=1M count=64 2>&1; rm big; echo ok >small; cat small"
        )
        assert "No space left on device" in filled
        assert filled.endswith("ok\n")
        mechanism, (occupied, most) = sandboxes.host.disks.mechanism, sandboxes.host.disks.used("one")
        assert (mechanism, most) == ("ext4-loop", 32 << 20)
        assert 0 < occupied < most


async def test_output_of_commands_is_not_taken_from_the_machine_without_limit(sandboxes):
    """A command may write where its output is kept: it is its own user who keeps it."""
    async with box(sandboxes) as limited:
        said_of_it = await said(limited, "df -m /run/agent-output | tail -n 1")
        assert 900 < int(said_of_it.split()[1]) <= 1024


async def test_what_is_in_a_workspace_outlives_its_containers_and_nothing_else_does(sandboxes, tmp_path):
    async with box(sandboxes) as first:
        await said(first, "echo kept >file; mkdir folder; seq 9999 2>/dev/null")
    assert left_in(tmp_path) == [str(tmp_path / "disks/one.img")]
    async with box(sandboxes) as second:
        assert await said(second, "cat file; ls") == "kept\nfile\nfolder\n"
    await sandboxes.forget("one")
    assert left_in(tmp_path) == []


async def test_a_killed_container_leaves_its_workspace_whole(sandboxes, engine):
    async with box(sandboxes) as first:
        await said(first, "echo kept >file; sync")
        await engine.kill(sandboxes.recorded("one").container)
        await first.ended
    async with box(sandboxes) as second:
        assert await said(second, "cat file") == "kept\n"


async def test_a_sandbox_begins_with_what_was_there_when_the_snapshot_was_taken(sandboxes):
    async with box(sandboxes) as first:
        await said(first, "echo before >file; mkdir -p a/b; ln -s /etc/passwd a/b/link")
        await first.freeze()
        taken = await sandboxes.snapshot("one")
        await first.thaw()
        await said(first, "echo after >file; rm -r a")
        async with box(sandboxes, "two", snapshot=taken.id) as second:
            assert await said(second, "cat file; readlink a/b/link; id -u") == "before\n/etc/passwd\n10001\n"
            assert await said(second, "echo mine >file; cat file") == "mine\n"
        assert await said(first, "cat file") == "after\n"


async def test_what_nobody_could_make_is_refused_before_anything_is_made(sandboxes, tmp_path):
    for wanted, sentence in (
        ({"snapshot": "0199"}, "sandbox.snapshot: there is no snapshot of this id"),
        ({"disk": "1m"}, "sandbox.disk: at least 16m"),
        ({"disk": "much"}, "disk: 'much' is no size"),
    ):
        with pytest.raises(InvalidParams, match=sentence):
            await sandboxes.admit(Sandbox(image=BUSYBOX, **wanted))
    assert left_in(tmp_path) == []


async def test_a_limit_is_refused_where_workspaces_have_none(opened):
    async with opened(disk=None) as sandboxes:
        with pytest.raises(IsolationUnavailable, match="sandbox.disk: this server cannot limit a workspace"):
            await sandboxes.admit(Sandbox(image=BUSYBOX, disk="64m"))
        async with box(sandboxes) as free:
            assert await said(free, "echo works >file; cat file") == "works\n"
            disks = sandboxes.host.disks
            assert (disks.mechanism, disks.used("one")) == ("none", None)
            assert (
                "engine_found",
                {"disk_quota": "none", "reason": "it is switched off"},
            ) in sandboxes.told.events
