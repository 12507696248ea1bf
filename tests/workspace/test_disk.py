"""Files of this machine are read and written whole, or not at all."""

import asyncio
import hashlib
import os
import stat
import subprocess
import sys
import threading

import pytest

from agent_sdk.protocol.errors import (
    ChangedDuringRead,
    InvalidParams,
    IsADirectory,
    NotADirectory,
    NotARegularFile,
    PathNotFound,
    TransferBroken,
)
from agent_sdk.workspace.atomic_file import atomic_file
from agent_sdk.workspace.disk import (
    BLOCK_BYTES,
    PIECE_BYTES,
    Folder,
    in_thread,
    open_folder,
    open_in_thread,
    open_source,
)
from tests.conftest import let_others_through

DATA = bytes(range(256)) * 9000


async def test_a_source_tells_size_and_mode_and_gives_small_pieces(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    (tmp_path / "f").chmod(0o604)
    async with open_source(tmp_path / "f") as source:
        pieces = [piece async for piece in source]
    assert (source.size, source.mode) == (len(DATA), 0o604)
    assert b"".join(pieces) == DATA
    assert {len(piece) for piece in pieces[:-1]} == {PIECE_BYTES}


@pytest.mark.parametrize("change", [b"longer", b""])
async def test_a_source_that_changes_is_not_passed_off_as_whole(tmp_path, change):
    (tmp_path / "f").write_bytes(DATA)
    with pytest.raises(ChangedDuringRead):
        async with open_source(tmp_path / "f") as source:
            async for _ in source:
                (tmp_path / "f").write_bytes(change)


async def test_a_source_that_is_replaced_is_still_the_old_one(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    (tmp_path / "g").write_bytes(b"other")
    async with open_source(tmp_path / "f") as source:
        (tmp_path / "g").rename(tmp_path / "f")
        assert b"".join([piece async for piece in source]) == DATA


async def test_only_regular_files_are_sources(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, error in (
        (tmp_path / "missing", PathNotFound),
        (tmp_path, IsADirectory),
        (tmp_path / "fifo", NotARegularFile),
        ("/dev/zero", NotARegularFile),
        ("a\0b", InvalidParams),
        ("", InvalidParams),
    ):
        with pytest.raises(error):
            async with open_source(path):
                pass


async def test_a_file_is_there_once_it_is_committed(tmp_path):
    target = tmp_path / "made" / "on" / "the" / "way"
    async with atomic_file(target, 0o640) as file:
        await file.write(DATA)
        assert not target.exists()
        done = await file.commit(size=len(DATA))
    assert (done.size, done.sha256, done.mode) == (len(DATA), hashlib.sha256(DATA).hexdigest(), 0o640)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (DATA, 0o640)
    assert os.listdir(target.parent) == ["way"]


async def test_the_mode_may_come_last_or_be_that_of_the_old_file(tmp_path):
    (tmp_path / "f").touch(0o711)
    async with atomic_file(tmp_path / "f") as file:
        assert (await file.commit()).mode == 0o711
    async with atomic_file(tmp_path / "f") as file:
        assert (await file.commit(mode=0o600)).mode == 0o600


async def test_leaving_without_a_commit_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    async with atomic_file(tmp_path / "f") as file:
        await file.write(DATA)
    with pytest.raises(TransferBroken, match="announced"):
        async with atomic_file(tmp_path / "f") as file:
            await file.commit(size=1)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


async def test_a_symlink_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    async with atomic_file(tmp_path / "link") as file:
        await file.write(b"new")
        await file.commit()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


async def test_only_a_file_can_be_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for path, error in (
        (tmp_path, IsADirectory),
        (f"{tmp_path}/new/", IsADirectory),
        (tmp_path / "fifo", NotARegularFile),
        (tmp_path / "file" / "x", NotADirectory),
    ):
        with pytest.raises(error):
            async with atomic_file(path):
                pass
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]


async def test_work_in_a_thread_is_finished_even_when_cancelled():
    begun, release, finished = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        release.wait()
        finished.set()

    task = asyncio.create_task(in_thread(work))
    await in_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished.is_set()


async def test_what_a_cancelled_call_opens_is_closed_again(tmp_path):
    begun, release = threading.Event(), threading.Event()

    def work() -> Folder:
        begun.set()
        release.wait()
        return open_folder(str(tmp_path))

    before = os.listdir("/proc/self/fd")
    task = asyncio.create_task(open_in_thread(work))
    await in_thread(begun.wait)
    task.cancel()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir("/proc/self/fd") == before


async def test_many_small_writes_are_one_block_on_the_disk(tmp_path):
    async with atomic_file(tmp_path / "f") as file:
        for start in range(0, BLOCK_BYTES + 1000, 1000):
            await file.write(DATA[start : start + 1000])
        done = await file.commit()
    assert (tmp_path / "f").read_bytes() == DATA[: done.size]


AS_SOMEBODY = """
import asyncio, os, sys
from agent_sdk import LocalWorkspace
from agent_sdk.protocol.errors import PathDenied

async def replace(folder):
    async with LocalWorkspace(folder, spool_dir=folder) as workspace:
        await workspace.execute("echo kept > f; chmod 444 f; cp /bin/sleep running; ./running 60 >&- 2>&- &")
        for write in (
            lambda: workspace.files.write("f", b"new"),
            lambda: workspace.upload("/etc/passwd", "f"),
            lambda: workspace.download("f", folder + "/f"),
        ):
            try:
                await write()
            except PathDenied as error:
                print(error)
        await workspace.execute("chmod 644 f")
        await workspace.files.write("f", b"new")
        await workspace.files.write("running", b"")  # the kernel lets nobody write it, but replace it

async def main():
    await replace(sys.argv[1])  # what is imported late is imported now
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    await replace(sys.argv[2])

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to be somebody else")
def test_a_file_that_may_not_be_written_is_not_replaced_either(tmp_path):
    """As the shell of the same user would say; whoever is root may."""
    let_others_through(tmp_path)
    for name in ("root", "f"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    folders = (str(tmp_path / "root"), str(tmp_path / "f"))
    ended = subprocess.run(
        [sys.executable, "-c", AS_SOMEBODY, *folders], capture_output=True, text=True, check=True
    )
    assert [line.partition(":")[0] for line in ended.stdout.splitlines()] == ["Permission denied"] * 3
    assert (tmp_path / "f" / "f").read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root")
async def test_who_may_write_everything_replaces_a_read_only_file_and_keeps_its_mode(tmp_path):
    (tmp_path / "f").touch(0o444)
    async with atomic_file(tmp_path / "f") as file:
        await file.write(b"new")
        assert (await file.commit()).mode == 0o444


async def test_a_file_in_the_making_has_no_name(tmp_path):
    async with atomic_file(tmp_path / "f") as file:
        await file.write(DATA)
        assert os.listdir(tmp_path) == []
        await file.commit()
    assert os.listdir(tmp_path) == ["f"]
