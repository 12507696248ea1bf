"""What every workspace promises about files that travel: whole and verified, or not at all."""

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_sdk.protocol.errors import (
    ChangedDuringRead,
    IsADirectory,
    NotADirectory,
    NotARegularFile,
    OutsideWorkspace,
    PathNotFound,
    TransferBroken,
)

BLOCK = bytes(range(256)) * 4096


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def tree(folder: Path) -> dict[str, tuple]:
    """What is in a folder: kind, mode, and content or target of each entry."""
    found = {}
    for path in folder.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (stat.S_IMODE(path.lstat().st_mode), content)
    return found


class TransferContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, pytest.param(5_000_003, marks=pytest.mark.place)])
    async def test_a_file_goes_up_and_comes_down_unchanged(self, workspace, tmp_path, size):
        source, copy = tmp_path / "source", tmp_path / "there" / "copy"
        source.write_bytes((BLOCK * 5)[:size])
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        up = await workspace.upload(source, "in/data.bin")
        down = await workspace.download("in/data.bin", copy)
        assert (up.size, up.sha256, down.size, down.sha256) == (size, digest, size, digest)
        assert copy.read_bytes() == source.read_bytes()
        assert (await workspace.execute("sha256sum < in/data.bin")).stdout.split()[0] == digest

    @pytest.mark.place
    async def test_mode_bits_travel(self, workspace, tmp_path):
        (tmp_path / "tool").write_text("#!/bin/sh\necho works\n")
        (tmp_path / "tool").chmod(0o750)
        up = await workspace.upload(str(tmp_path / "tool"), "bin/tool")
        down = await workspace.download("bin/tool", tmp_path / "back")
        assert (up.mode, down.mode, stat.S_IMODE((tmp_path / "back").stat().st_mode)) == (0o750,) * 3
        assert (await workspace.execute(["./bin/tool"])).stdout == "works\n"

    async def test_a_missing_source_is_a_file_not_found_error_both_ways(self, workspace, tmp_path):
        with pytest.raises(FileNotFoundError):
            await workspace.upload(tmp_path / "nowhere", "f")
        with pytest.raises(FileNotFoundError):
            await workspace.download("nowhere", tmp_path / "f")
        assert os.listdir(tmp_path) == [] or not (tmp_path / "f").exists()
        assert await workspace.files.list() == []

    @pytest.mark.place
    async def test_only_regular_files_travel(self, workspace, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(NotARegularFile):
            await workspace.upload(tmp_path / "fifo", "f")
        with pytest.raises(IsADirectory):
            await workspace.upload(tmp_path, "f")
        await workspace.execute("mkfifo pipe")
        with pytest.raises(NotARegularFile):
            await workspace.download("pipe", tmp_path / "f")

    @pytest.mark.place
    async def test_an_upload_replaces_a_file_as_a_whole(self, workspace, tmp_path):
        await workspace.files.write("f", b"a much longer old text")
        (tmp_path / "source").write_bytes(b"new")
        await workspace.upload(tmp_path / "source", "f")
        assert await workspace.files.read("f") == b"new"
        assert (await workspace.execute("ls -A")).stdout == "f\n"

    async def test_a_download_that_fails_keeps_the_old_file(self, workspace, tmp_path):
        (tmp_path / "copy").write_bytes(b"old")
        with pytest.raises(PathNotFound):
            await workspace.download("nowhere", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []

    # --- folders ---

    @pytest.mark.place
    async def test_a_folder_goes_up_and_comes_down_with_all_that_is_in_it(self, workspace, tmp_path):
        there = tmp_path / "there"
        (there / "a" / "empty").mkdir(parents=True)
        (there / "a" / "tool").write_bytes(BLOCK * 2)
        (there / "a" / "tool").chmod(0o751)
        os.utime(there / "a" / "tool", (1e9, 1e9))
        (there / ("x" * 200)).write_text("a long name")
        (there / "é\udcff").write_text("no name in UTF-8")
        (there / "a" / "link").symlink_to("../a/tool")
        (there / "a" / "dangling").symlink_to("nowhere")
        await workspace.files.write("goal/stays", b"old")
        await workspace.files.write("goal/a/tool", b"old")
        await workspace.upload_dir(there, "goal")
        assert await workspace.files.read("goal/stays") == b"old"
        assert (await workspace.execute("stat -c '%a %Y' goal/a/tool")).stdout == "751 1000000000\n"
        await workspace.files.remove("goal/stays")
        await workspace.download_dir(tmp_path / "back", "goal")
        assert tree(tmp_path / "back") == tree(there)

    async def test_what_is_excluded_stays(self, workspace, tmp_path):
        await workspace.execute(
            "mkdir -p f/.git f/b/.git f/build/x; touch f/.git/o f/b/c.pyc f/b/c.py f/build/x/y"
        )
        await workspace.download_dir(tmp_path / "all", "f", exclude=[".git", "*.pyc", "build/*"])
        assert sorted(tree(tmp_path / "all")) == ["b", "b/c.py", "build"]
        await workspace.upload_dir(tmp_path / "all", "up", exclude=("b",))
        assert [info.path for info in await workspace.files.list("up")] == ["up/build"]

    @pytest.mark.parametrize(
        "target", [pytest.param("/etc/passwd", marks=pytest.mark.place), "../../x", "d/../../x", ".."]
    )
    async def test_a_symlink_that_leads_out_of_its_folder_does_not_travel(self, workspace, tmp_path, target):
        (tmp_path / "up").mkdir()
        (tmp_path / "up" / "link").symlink_to(target)
        await workspace.execute(["sh", "-c", "mkdir down; ln -s $0 down/link", target])
        with pytest.raises(OutsideWorkspace, match="exclude it: link"):
            await workspace.upload_dir(tmp_path / "up", "new/goal")
        with pytest.raises(OutsideWorkspace, match="exclude it: link"):
            await workspace.download_dir(tmp_path / "new" / "goal", "down")
        assert "new" not in [info.path for info in await workspace.files.list(".")]
        assert not (tmp_path / "new").exists()
        await workspace.upload_dir(tmp_path / "up", "goal", exclude=("link",))
        assert await workspace.files.list("goal") == []

    @pytest.mark.place
    async def test_nothing_goes_through_a_symlink_that_is_there_already(self, workspace, tmp_path):
        (tmp_path / "up" / "d").mkdir(parents=True)
        (tmp_path / "up" / "d" / "f").write_text("stray")
        await workspace.execute("mkdir goal other; ln -s ../other goal/d")
        with pytest.raises(NotADirectory):
            await workspace.upload_dir(tmp_path / "up", "goal")
        assert await workspace.files.list("other") == []

    async def test_only_a_folder_travels_as_one(self, workspace, tmp_path):
        (tmp_path / "f").touch()
        os.makedirs(tmp_path / "d")
        os.mkfifo(tmp_path / "d" / "pipe")
        for source, error in (("nowhere", PathNotFound), ("f", NotADirectory), ("d", NotARegularFile)):
            with pytest.raises(error):
                await workspace.upload_dir(tmp_path / source, "goal")
        await workspace.execute(
            "touch f; mkdir d e; mkfifo d/pipe \"$(printf 'e/\\377')\""
        )  # whose name is no text
        refused = {"nowhere": PathNotFound, "f": NotADirectory, "d": NotARegularFile, "e": NotARegularFile}
        for source, error in refused.items():
            with pytest.raises(error):
                await workspace.download_dir(tmp_path / "goal", source)
        with pytest.raises(NotADirectory):
            await workspace.upload_dir(tmp_path, "f", exclude=["*"])

    # --- byte streams ---

    async def test_a_file_is_written_from_pieces(self, workspace):
        written = await workspace.write_stream("d/f", pieces(b"one ", b"", b"two"), size=7, mode=0o640)
        assert (written.size, written.mode) == (7, 0o640)
        assert written.sha256 == hashlib.sha256(b"one two").hexdigest()
        assert await workspace.files.read("d/f") == b"one two"

    @pytest.mark.parametrize("size", [3, 2_000_000])
    async def test_a_file_of_another_size_than_announced_is_not_kept(self, workspace, size):
        await workspace.files.write("f", b"old")
        with pytest.raises(TransferBroken):
            await workspace.write_stream("f", pieces(b"more than three"), size=size)
        assert await workspace.files.read("f") == b"old"
        assert (await workspace.execute("ls -A")).stdout == "f\n"

    @pytest.mark.place
    async def test_an_upload_that_breaks_leaves_nothing_behind(self, workspace):
        async def broken() -> AsyncIterator[bytes]:
            yield BLOCK
            yield BLOCK
            raise RuntimeError("the source broke")

        with pytest.raises(RuntimeError, match="the source broke"):
            await workspace.write_stream("f", broken())
        assert (await workspace.execute("ls -A")).stdout == ""

    @pytest.mark.place
    async def test_an_upload_that_is_cancelled_leaves_nothing_behind(self, workspace):
        sent = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield BLOCK
            yield BLOCK
            sent.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(workspace.write_stream("f", endless()))
        await sent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await workspace.execute("ls -A")).stdout == ""

    async def test_a_file_is_read_in_pieces(self, workspace):
        await workspace.files.write("f", BLOCK * 2, mode=0o600)
        async with workspace.read_stream("f") as stream:
            read = [piece async for piece in stream]
        assert (stream.size, stream.mode) == (len(BLOCK) * 2, 0o600)
        assert b"".join(read) == BLOCK * 2
        assert max(map(len, read)) <= 65_536

    async def test_a_part_of_a_file_is_read_in_pieces(self, workspace):
        await workspace.files.write("f", b"0123456789")
        async with workspace.read_stream("f", offset=2, length=5) as stream:
            assert (stream.size, stream.mode) == (10, 0o644)
            assert b"".join([piece async for piece in stream]) == b"23456"

    async def test_what_cannot_be_read_is_refused_at_the_opening(self, workspace):
        await workspace.execute("mkdir folder; mkfifo pipe; echo 123 > f; ln -s f link")
        for path, error in (("nowhere", PathNotFound), ("folder", IsADirectory), ("pipe", NotARegularFile)):
            with pytest.raises(error):
                async with workspace.read_stream(path):
                    pytest.fail("it is open")
        async with workspace.read_stream("link") as stream:
            assert stream.size == 4

    async def test_who_wants_to_know_hears_how_far_a_file_has_come(self, workspace, tmp_path):
        told: list[tuple[int, int]] = []

        async def tell(done: int, total: int) -> None:
            told.append((done, total))

        (tmp_path / "source").write_bytes(BLOCK)
        await workspace.upload(tmp_path / "source", "f", on_progress=lambda *so_far: told.append(so_far))
        await workspace.download("f", tmp_path / "copy", on_progress=tell)
        ups, downs = told[: told.index((0, len(BLOCK)), 1)], told[told.index((0, len(BLOCK)), 1) :]
        for way in (ups, downs):
            assert (way[0], way[-1]) == ((0, len(BLOCK)), (len(BLOCK), len(BLOCK)))
            assert way == sorted(set(way))

    async def test_a_stream_may_be_left_early(self, workspace):
        await workspace.files.write("f", BLOCK * 8)
        async with workspace.read_stream("f") as stream:
            async for _ in stream:
                break
        assert (await workspace.execute("echo fine")).stdout == "fine\n"

    async def test_a_file_that_changes_while_it_is_read_is_not_passed_off_as_whole(self, workspace):
        await workspace.execute("head -c 20M /dev/zero > f")
        with pytest.raises(ChangedDuringRead):
            async with workspace.read_stream("f") as stream:
                async for _ in stream:
                    await workspace.execute("echo more >> f")
                    async for _ in stream:
                        pass
