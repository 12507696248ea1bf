"""Copies of workspaces: what is in them, what is refused, and that nothing half made stays."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable, NotFound, StorageFull
from tests.docker.places import limited, unlimited
from workspaces.backend.disks import Snapshots

pytestmark = pytest.mark.docker

SIZE = 32 << 20


@pytest.fixture(params=["disk", "folder"])
async def disks(request, tmp_path):
    return await limited(tmp_path) if request.param == "disk" else await unlimited(tmp_path)


@pytest.fixture
def snapshots(disks, tmp_path):
    return Snapshots(tmp_path / "snapshots", disks)


def fill(folder: Path) -> None:
    (folder / "program").write_text("#!/bin/sh\n")
    (folder / "program").chmod(0o750)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "bytes").write_bytes(bytes(range(256)))
    (folder / "points-out").symlink_to("/etc/passwd")
    (folder / "points-nowhere").symlink_to("nothing")
    os.mkfifo(folder / "pipe")


def content(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    def seen(path: Path) -> tuple[int, bytes | str]:
        mode = path.lstat().st_mode
        if path.is_symlink():
            return mode, str(path.readlink())
        return mode, path.read_bytes() if path.is_file() else b""

    return {str(path.relative_to(folder)): seen(path) for path in folder.rglob("*")}


async def test_a_workspace_that_begins_with_a_snapshot_has_all_that_was_there(disks, snapshots):
    await disks.make("one", SIZE)
    async with disks.at_hand("one") as folder:
        fill(folder)
        before = content(folder)
    taken = await snapshots.take("one")
    async with disks.at_hand("one") as folder:
        (folder / "program").write_text("changed since")
    await snapshots.lay_out(taken.id, "two")
    async with disks.at_hand("two") as folder:
        assert content(folder) == before
        (folder / "program").write_text("changed in the copy")
    await snapshots.lay_out(taken.id, "three")
    async with disks.at_hand("three") as folder:
        assert content(folder) == before


def holds(folder: Path, text: str) -> bool:
    return subprocess.run(["grep", "-rq", text, folder], check=False).returncode == 0


async def test_what_links_lead_to_is_not_copied(disks, snapshots, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not for sandboxes")
    assert holds(tmp_path, "not for sandboxes")
    await disks.make("one", SIZE)
    async with disks.at_hand("one") as folder:
        (folder / "file").symlink_to(secret)
        (folder / "folder").symlink_to(tmp_path, target_is_directory=True)
    taken = await snapshots.take("one")
    assert not holds(tmp_path / "snapshots", "not for sandboxes")
    await snapshots.lay_out(taken.id, "two")
    async with disks.at_hand("two") as folder:
        assert (folder / "file").readlink() == secret


async def test_the_size_of_a_snapshot_is_what_it_occupies(disks, snapshots):
    await disks.make("one", SIZE)
    empty = (await snapshots.take("one")).size
    async with disks.at_hand("one") as folder:
        (folder / "big").write_bytes(os.urandom(4 << 20))
    full = (await snapshots.take("one")).size
    assert empty < 2 << 20
    assert 4 << 20 <= full < 7 << 20


async def test_a_snapshot_nobody_took_is_refused(disks, snapshots, tmp_path):
    (tmp_path / "outside").mkdir()
    for id in ("0199-unknown", "../outside", "", "x" * 65, "."):
        with pytest.raises(InvalidParams, match="there is no snapshot of this id"):
            await snapshots.lay_out(id, "one")
    assert not disks.has("one")


async def test_a_workspace_that_is_there_is_not_overwritten(disks, snapshots):
    await disks.make("one", SIZE)
    taken = await snapshots.take("one")
    async with disks.at_hand("one") as folder:
        (folder / "work").write_text("of an hour")
    await snapshots.lay_out(taken.id, "one")
    async with disks.at_hand("one") as folder:
        assert (folder / "work").read_text() == "of an hour"


async def test_an_owner_without_a_workspace_has_no_snapshot(snapshots, tmp_path):
    with pytest.raises(NotFound, match="run something in it first"):
        await snapshots.take("nobody")
    assert not (tmp_path / "snapshots").exists()


async def test_another_size_than_that_of_the_snapshot_is_refused(disks, snapshots):
    await disks.make("one", SIZE)
    taken = await snapshots.take("one")
    with pytest.raises(InvalidParams, match="sandbox.disk: the snapshot has (32m|no limit); leave disk out"):
        await snapshots.lay_out(taken.id, "two", 2 * SIZE)
    assert not disks.has("two")


async def test_a_disk_is_refused_where_disks_cannot_be_mounted_any_more(tmp_path):
    disks = await limited(tmp_path)
    await disks.make("one", SIZE)
    taken = await Snapshots(tmp_path / "snapshots", disks).take("one")
    folders = await unlimited(tmp_path)
    with pytest.raises(IsolationUnavailable, match="it is a disk, and this server cannot mount one"):
        await Snapshots(tmp_path / "snapshots", folders).lay_out(taken.id, "two")
    assert not folders.has("two")


async def test_a_snapshot_that_does_not_fit_leaves_nothing(tmp_path):
    host = await limited(tmp_path)
    await host.make("small", SIZE)
    async with host.at_hand("small") as small:
        disks = await unlimited(small)
        await disks.make("one", SIZE)
        (disks.folder("one") / "big").write_bytes(bytes(range(256)) * (SIZE // 2 // 256))
        with pytest.raises(StorageFull, match="the disk of the server is full"):
            await Snapshots(small / "snapshots", disks).take("one")
        assert list((small / "snapshots").iterdir()) == []
