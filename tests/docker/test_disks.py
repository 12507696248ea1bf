"""The workspaces of sandboxes: what they may hold, and that nothing of them stays mounted."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_sdk.protocol.errors import InvalidParams, IsolationUnavailable, WorkspaceUnavailable
from tests.docker.places import limited, unlimited
from workspaces.backend.contract import UID
from workspaces.backend.disks import Disks

pytestmark = pytest.mark.docker

SIZE = 32 << 20


@pytest.fixture
async def disks(tmp_path):
    return await limited(tmp_path)


@pytest.fixture
async def folders(tmp_path):
    return await unlimited(tmp_path)


def mounted_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if f" {folder}/" in line]


def loops_below(folder: Path) -> list[str]:
    return [
        file.read_text().strip()
        for file in Path("/sys/block").glob("loop*/loop/backing_file")
        if file.read_text().startswith(f"{folder}/")
    ]


async def test_a_workspace_holds_what_it_may_and_no_more(disks):
    await disks.make("one", SIZE)
    async with disks.at_hand("one") as folder:
        with pytest.raises(OSError, match="No space left"), (folder / "big").open("wb") as big:
            for _ in range(SIZE >> 20):
                big.write(bytes(1 << 20))
        (folder / "big").unlink()
        (folder / "small").write_bytes(b"fits")
    async with disks.at_hand("one") as folder:
        assert [path.name for path in folder.iterdir()] == ["small"]
        assert (folder / "small").read_bytes() == b"fits"


async def test_a_workspace_belongs_to_the_user_of_sandboxes_and_gives_no_rights(disks, tmp_path):
    await disks.make("one", SIZE)
    async with disks.at_hand("one") as folder:
        assert (folder.stat().st_uid, folder.stat().st_gid) == (UID, UID)
        assert list(folder.iterdir()) == []
        (line,) = mounted_below(tmp_path)
        assert {"nosuid", "nodev"} <= set(line.split()[5].split(","))


async def test_a_fresh_disk_takes_next_to_no_room(disks):
    await disks.make("one", 2 << 30)
    occupied, size = disks.used("one")
    assert size == 2 << 30
    assert occupied < 4 << 20


async def test_nothing_is_mounted_or_attached_when_nobody_needs_it(disks, tmp_path):
    await disks.make("one", SIZE)
    async with disks.at_hand("one"):
        assert len(mounted_below(tmp_path)) == len(loops_below(tmp_path)) == 1
    assert mounted_below(tmp_path) == loops_below(tmp_path) == []


async def test_a_cancel_at_any_moment_leaves_nothing_mounted(disks, tmp_path):
    await disks.make("one", SIZE)

    async def stay():
        async with disks.at_hand("one"):
            await asyncio.Event().wait()

    for turns in range(12):
        task = asyncio.create_task(stay())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert mounted_below(tmp_path) == []
    async with disks.at_hand("one") as folder:
        assert list(folder.iterdir()) == []


async def test_two_who_need_the_same_disk_come_one_after_the_other(disks, tmp_path):
    await disks.make("one", SIZE)
    most = 0

    async def use(name: str) -> None:
        nonlocal most
        async with disks.at_hand("one") as folder:
            most = max(most, len(mounted_below(tmp_path)))
            (folder / name).touch()
            await asyncio.sleep(0)

    await asyncio.gather(*(use(f"file-{number}") for number in range(4)))
    assert most == 1
    async with disks.at_hand("one") as folder:
        assert len(list(folder.iterdir())) == 4


def elsewhere(folder: Path, own: Path) -> subprocess.Popen[bytes]:
    """A process with a mount of its own of this folder; it writes a file there when it is told to."""
    own.mkdir()
    script = 'mount --bind "$0" "$1" && echo && read x; touch "$1/after"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, folder, own]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


async def test_a_disk_is_handed_over_while_it_is_mounted_elsewhere(disks, tmp_path):
    """As a container does: its own mount goes on under whatever name the disk has here."""
    await disks.make("one", SIZE)
    async with disks.at_hand("one") as folder:
        (folder / "before").touch()
        keeper = elsewhere(folder, tmp_path / "own")
    await disks.hand_over("one", "two")
    async with disks.at_hand("two"):
        assert len(loops_below(tmp_path)) == 1
    keeper.communicate(b"\n", timeout=20)
    assert not disks.has("one")
    async with disks.at_hand("two") as folder:
        assert {path.name for path in folder.iterdir()} == {"before", "after"}
    assert loops_below(tmp_path) == []


KILLED = """
import asyncio, sys, pathlib
from workspaces.backend.disks import Disks

async def main():
    disks = Disks(pathlib.Path(sys.argv[1]))
    await disks.prepare()
    await disks.make("one", 32 << 20)
    async with disks.at_hand("one") as folder:
        (folder / "kept").write_text("kept")
        print("mounted", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def kill_while_mounted(data: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(data)], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.communicate()


async def test_what_a_killed_server_has_mounted_is_unmounted_by_the_next_and_whole(disks, tmp_path):
    data = tmp_path / "killed"
    data.mkdir()
    kill_while_mounted(data)
    assert len(mounted_below(data)) == 1
    (data / "disks" / "half.fresh").touch()
    found = await limited(data)
    assert mounted_below(data) == loops_below(data) == []
    assert [path.name for path in (data / "disks").iterdir()] == ["one.img"]
    async with found.at_hand("one") as folder:
        assert (folder / "kept").read_text() == "kept"


async def test_a_workspace_that_is_removed_is_gone(disks, folders, tmp_path):
    for place in (disks, folders):
        await place.make("one", SIZE)
        await place.remove("one")
        assert not place.has("one")
    assert list((tmp_path / "disks").iterdir()) == list((tmp_path / "workspaces").iterdir()) == []


async def test_only_the_workspaces_that_are_wanted_stay(disks, folders):
    await disks.make("pool-1", SIZE)
    await disks.make("one", SIZE)
    await folders.make("pool-2", SIZE)
    await folders.make("two", SIZE)
    await disks.keep(lambda owner: not owner.startswith("pool-"))
    assert [disks.has(owner) for owner in ("pool-1", "pool-2", "one", "two")] == [False, False, True, True]


async def test_a_limit_that_cannot_be_enforced_is_refused(folders):
    with pytest.raises(
        IsolationUnavailable, match="cannot limit a workspace: it is switched off; leave disk out"
    ):
        folders.check(SIZE)
    folders.check(None)
    await folders.make("one", SIZE)
    async with folders.at_hand("one") as folder:
        assert folder.stat().st_uid == (UID if os.geteuid() == 0 else os.geteuid())


async def test_where_the_engine_does_not_see_them_there_is_no_limit_and_a_reason(tmp_path):
    disks = Disks(tmp_path)
    await disks.prepare(unseen="the engine is elsewhere")
    assert disks.mechanism == "none"
    assert disks.why == "the engine is elsewhere"


async def test_a_disk_that_would_be_all_journal_is_refused(disks):
    with pytest.raises(InvalidParams, match="at least 16m"):
        disks.check(1 << 20)
    disks.check(SIZE)


async def test_a_disk_that_is_larger_than_that_of_the_server_is_refused(disks):
    with pytest.raises(InvalidParams, match="the disk of the server has [0-9]+g in all"):
        disks.check(1 << 60)


async def test_a_damaged_disk_is_one_clear_error_and_nothing_stays(disks, tmp_path):
    disks.image("one").write_bytes(bytes(SIZE))
    with pytest.raises(WorkspaceUnavailable, match="mount failed: .*") as refused:
        async with disks.at_hand("one"):
            pass
    assert refused.value.details["phase"] == "disk"
    assert mounted_below(tmp_path) == loops_below(tmp_path) == []
