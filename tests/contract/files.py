"""What every workspace promises about files and folders."""

import pytest

from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    IsADirectory,
    LimitExceeded,
    NotADirectory,
    NotARegularFile,
    PathError,
    PathNotFound,
)

STRANGE_NAMES = [
    "-rf",
    "new\nline",
    "a b",
    "$HOME",
    "~",
    "back\\slash",
    "CON",
    "a:b",
    "\u202egnp.exe",
    "é",
    "e\u0301",
    "*",
]


class FileContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.place
    async def test_what_is_written_is_read(self, workspace):
        data = bytes(range(256)) * 300
        written = await workspace.files.write("a/b/c.bin", data)
        assert (written.size, await workspace.files.read("a/b/c.bin")) == (len(data), data)

    async def test_a_part_of_a_file_can_be_read(self, workspace):
        await workspace.files.write("f", b"0123456789")
        assert await workspace.files.read("f", offset=3, limit=4) == b"3456"
        assert await workspace.files.read("f", offset=8) == b"89"
        assert await workspace.files.read("f", offset=50) == b""

    @pytest.mark.place
    async def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(self, workspace):
        await workspace.execute("echo a long old text > f; chmod 751 f")
        written = await workspace.files.write("f", b"new")
        assert (await workspace.files.read("f"), written.mode) == (b"new", 0o751)
        assert (await workspace.execute("stat -c %a f; ls -A")).stdout == "751\nf\n"

    @pytest.mark.place
    async def test_a_new_file_gets_the_mode_that_was_asked_for(self, workspace):
        await workspace.files.write("f", b"", mode=0o600)
        assert (await workspace.files.stat("f")).mode == 0o600

    @pytest.mark.place
    async def test_writing_through_a_symlink_keeps_the_symlink(self, workspace):
        await workspace.execute("mkdir d; echo old > d/real; ln -s d/real link; ln -s d/new dangling")
        await workspace.files.write("link", b"1")
        await workspace.files.write("dangling", b"2")
        assert (await workspace.execute("cat d/real d/new; readlink link")).stdout == "12d/real\n"

    @pytest.mark.place
    async def test_names_are_kept_exactly(self, workspace):
        for name in STRANGE_NAMES:
            await workspace.files.write(name, b"x")
        assert [info.path for info in await workspace.files.list()] == sorted(STRANGE_NAMES)
        listed = await workspace.execute(["find", ".", "-type", "f", "-printf", "%P\\0"])
        assert sorted(listed.stdout.split("\0")[:-1]) == sorted(STRANGE_NAMES)

    async def test_a_folder_is_listed_sorted_and_as_deep_as_asked(self, workspace):
        await workspace.execute("mkdir -p b/c; echo 12 > b/f; touch a .h b/c/g; ln -s b l; mkfifo p")
        flat = [(info.path, info.type) for info in await workspace.files.list()]
        assert flat == [(".h", "file"), ("a", "file"), ("b", "dir"), ("l", "symlink"), ("p", "other")]
        deep = [info.path for info in await workspace.files.list("b", depth=2, hidden=False)]
        assert deep == ["b/c", "b/c/g", "b/f"]

    async def test_a_folder_of_very_many_is_listed_whole(self, workspace):
        await workspace.execute("mkdir many && cd many && seq 10001 20100 | xargs touch")
        found = await workspace.files.list("many")
        assert [info.path for info in found] == [f"many/{number}" for number in range(10001, 20101)]

    async def test_more_than_can_be_read_at_once_is_refused_and_never_cut(self, workspace):
        await workspace.execute("truncate -s 80M f")
        for limit in (None, 100 << 20, (64 << 20) + 1):
            with pytest.raises(LimitExceeded, match="at most 67108864 bytes at once"):
                await workspace.files.read("f", limit=limit)
        assert len(await workspace.files.read("f", offset=79 << 20, limit=100 << 20)) == 1 << 20

    async def test_a_file_that_grows_meanwhile_is_read_as_it_is(self, workspace):
        await workspace.execute("head -c 9M /dev/zero > f")
        growing = await workspace.start("while :; do echo more >> f; done")
        assert len(await workspace.files.read("f")) >= 9 << 20
        await growing.signal("KILL")
        await growing.wait()

    @pytest.mark.place
    async def test_a_path_is_described_a_symlink_itself(self, workspace):
        await workspace.execute("mkdir d; echo 12 > d/f; chmod 640 d/f; ln -s nowhere l")
        file, link = await workspace.files.stat("d/f"), await workspace.files.stat("l")
        assert (file.path, file.type, file.size, file.mode) == ("d/f", "file", 3, 0o640)
        assert (link.type, link.target) == ("symlink", "nowhere")
        assert (await workspace.files.stat(".")).type == "dir"

    @pytest.mark.place
    async def test_files_folders_and_symlinks_are_removed(self, workspace):
        await workspace.execute("mkdir -p d/e empty; touch f d/e/g; ln -s d l")
        for path in ("f", "l", "empty"):
            await workspace.files.remove(path)
        await workspace.files.remove("d", recursive=True)
        assert await workspace.files.list() == []

    async def test_a_folder_with_content_is_not_removed_by_chance(self, workspace):
        await workspace.execute("mkdir d; touch d/f")
        with pytest.raises(PathError, match="d"):
            await workspace.files.remove("d")
        assert (await workspace.files.stat("d/f")).type == "file"

    @pytest.mark.place
    async def test_moving_replaces_a_file_and_makes_parents(self, workspace):
        await workspace.execute("echo 1 > a; mkdir x; echo 2 > x/b")
        await workspace.files.move("a", "x/b")
        await workspace.files.move("x", "y/z")
        assert await workspace.files.read("y/z/b") == b"1\n"

    async def test_making_a_folder_makes_its_parents_and_may_be_repeated(self, workspace):
        await workspace.files.mkdir("a/b/c")
        await workspace.files.mkdir("a/b/c/")
        assert (await workspace.files.stat("a/b/c")).type == "dir"

    @pytest.mark.place
    async def test_absolute_paths_below_the_root_are_fine(self, workspace):
        root = (await workspace.describe()).working_dir
        await workspace.files.mkdir(f"{root}/a/b")
        await workspace.files.write(f"{root}/a//b/../f", b"x")
        assert await workspace.files.read(f"{root}/./a/f") == b"x"

    @pytest.mark.place
    async def test_what_is_listed_can_be_read_by_its_path(self, workspace):
        await workspace.execute("mkdir -p a/b; echo x > a/b/f; echo x > g")
        for folder in (".", "a", (await workspace.describe()).working_dir):
            found = [info for info in await workspace.files.list(folder, depth=3) if info.type == "file"]
            assert [await workspace.files.read(info.path) for info in found] == [b"x\n"] * len(found)
            assert found

    @pytest.mark.place
    @pytest.mark.parametrize("path", [".", "./", "a/.."])
    async def test_the_working_folder_itself_stays(self, workspace, path):
        await workspace.files.mkdir("a")
        with pytest.raises(InvalidParams):
            await workspace.files.remove(path, recursive=True)
        with pytest.raises(InvalidParams):
            await workspace.files.move(path, "b")

    @pytest.mark.place
    async def test_symlinks_that_stay_inside_are_followed(self, workspace):
        root = (await workspace.describe()).working_dir
        await workspace.execute(f"mkdir -p a/b; echo x > a/f; ln -s ../../a a/b/up; ln -s {root}/a abs")
        assert await workspace.files.read("a/b/up/b/up/f") == b"x\n"
        assert await workspace.files.read("abs/f") == b"x\n"

    # --- what is refused ---

    @pytest.mark.parametrize("verb", ["read", "list", "remove", "mkdir", "stat"])
    async def test_an_impossible_path_is_refused(self, workspace, verb):
        for path in ("", "a\0b", "x" * 5000, "y" * 300, "a/" * 2500):
            with pytest.raises(InvalidParams):
                await getattr(workspace.files, verb)(path)

    @pytest.mark.parametrize(
        ("verb", "path", "error"),
        [
            ("read", "nothing", PathNotFound),
            ("read", "no/thing", PathNotFound),
            ("read", "folder", IsADirectory),
            ("read", "fifo", NotARegularFile),
            ("read", "file/", NotADirectory),
            ("read", "file/x", NotADirectory),
            ("read", "loop", PathError),
            ("list", "file", NotADirectory),
            ("list", "nothing", PathNotFound),
            ("stat", "nothing", PathNotFound),
            ("stat", "file/", NotADirectory),
            ("remove", "nothing", PathNotFound),
            ("remove", "file/", NotADirectory),
            ("mkdir", "file", NotADirectory),
            ("mkdir", "file/x", NotADirectory),
        ],
    )
    async def test_the_error_is_the_one_the_path_deserves(self, workspace, verb, path, error):
        await workspace.execute("mkdir folder; touch file; mkfifo fifo; ln -s loop loop")
        with pytest.raises(error):
            await getattr(workspace.files, verb)(path)

    @pytest.mark.parametrize(
        ("path", "error"),
        [
            ("folder", IsADirectory),
            (".", IsADirectory),
            ("new/", IsADirectory),
            ("fifo", NotARegularFile),
            ("file/", NotADirectory),
            ("file/x", NotADirectory),
        ],
    )
    async def test_only_a_file_can_be_written(self, workspace, path, error):
        await workspace.execute("mkdir folder; touch file; mkfifo fifo")
        with pytest.raises(error):
            await workspace.files.write(path, b"x")
        assert (await workspace.execute("find . -name '*.part'")).stdout == ""

    async def test_a_missing_file_is_a_file_not_found_error(self, workspace):
        with pytest.raises(FileNotFoundError):
            await workspace.files.read("nowhere")

    @pytest.mark.place
    @pytest.mark.parametrize("verb", ["remove", "move"])
    async def test_the_root_itself_stays(self, workspace, verb):
        arguments = (".", "elsewhere") if verb == "move" else (".",)
        with pytest.raises(AgentServerError):
            await getattr(workspace.files, verb)(*arguments)

    async def test_a_folder_cannot_move_into_itself(self, workspace):
        await workspace.files.mkdir("a/b")
        with pytest.raises(AgentServerError):
            await workspace.files.move("a", "a/b/c")
        assert (await workspace.files.stat("a/b")).type == "dir"
