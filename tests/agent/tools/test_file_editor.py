"""The file editor on real files."""

import json
import os
import re

import pytest

from agent_sdk.agent.mask import Mask
from agent_sdk.agent.tools.file_editor import FileEditorTool
from agent_sdk.protocol.errors import OutsideWorkspace, ToolError
from agent_sdk.tools import ToolContext
from agent_sdk.workspace.local import LocalWorkspace


@pytest.fixture
async def edit(tmp_path):
    """Calls the tool as a model does; returns the text of the result."""
    editor = FileEditorTool()
    async with LocalWorkspace(tmp_path) as workspace:

        async def called(command: str, path: str, **arguments) -> str:
            context = ToolContext(workspace=workspace)
            everything = {"command": command, "path": path, **arguments}
            return (await editor.run(json.dumps(everything), context)).text

        yield called


# --- view ---


async def test_a_file_is_shown_with_numbers(edit, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert await edit("view", "a.txt") == f"{tmp_path}/a.txt\n     1\tone\n     2\ttwo"


async def test_absolute_and_relative_paths_name_the_same_file(edit, tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    assert await edit("view", str(tmp_path / "a.txt")) == await edit("view", "./x/../a.txt")


async def test_part_of_a_file_is_shown(edit, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(1, 101)))
    text = await edit("view", "a.txt", view_range=[99, -1])
    assert text == f"{tmp_path}/a.txt (lines 99 to 100 of 100)\n    99\tline 99\n   100\tline 100"
    assert (await edit("view", "a.txt", view_range=[3, 3])).endswith("\n     3\tline 3")
    assert (await edit("view", "a.txt", view_range=[100, 500])).endswith("\n   100\tline 100")


@pytest.mark.parametrize("view_range", [[0, 1], [4, 5], [3, 2], [1], [1, 2, 3], "1-2"])
async def test_a_part_that_cannot_be_is_named(edit, tmp_path, view_range):
    (tmp_path / "a.txt").write_text("1\n2\n3\n")
    with pytest.raises(ToolError, match="view_range"):
        await edit("view", "a.txt", view_range=view_range)


async def test_an_empty_file_is_called_empty(edit, tmp_path):
    (tmp_path / "a.txt").touch()
    assert await edit("view", "a.txt") == f"{tmp_path}/a.txt is empty."


async def test_a_folder_is_shown_two_levels_deep_without_hidden_entries(edit, tmp_path):
    for path in ("src/deep/deeper/no.py", "src/yes.py", ".git/config", "readme"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    text = await edit("view", ".")
    assert text.splitlines()[1:] == [
        "readme",
        "src/",
        "src/deep/",
        "src/yes.py",
        "[1 hidden entries are left out; `ls -a` shows them.]",
    ]


async def test_a_long_file_is_cut_after_a_line_and_says_how_to_see_more(edit, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n}\n" for n in range(1, 100_001)))
    text = await edit("view", "a.txt")
    assert len(text) < 16_300
    last = int(re.search(r"Cut after line (\d+) of 100000", text)[1])
    assert f"\t{last}\n[Cut" in text
    assert f"\t{last + 1}\n" in await edit("view", "a.txt", view_range=[last + 1, last + 2])


async def test_a_very_long_line_is_cut(edit, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100_000)
    text = await edit("view", "a.txt")
    assert len(text) < 16_300
    assert "rest of this long line" in text


@pytest.mark.parametrize("rest", ["", "\n", "\nmore\n"])
async def test_where_a_long_line_is_cut_no_beginning_of_a_secret_is_shown(edit, tmp_path, rest):
    (tmp_path / "a.txt").write_text("x" * 15_988 + "hunter2-hunter2" + rest)
    text = await edit("view", "a.txt")
    assert "xhunt" in text
    assert "x<secret-hidden>…\n[The rest" in Mask(["hunter2-hunter2"]).text(text)
    assert ("[Cut after line 1 of 2" in text) == (rest == "\nmore\n")


async def test_what_is_no_text_is_refused(edit, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    with pytest.raises(ToolError, match="path: .*no text file"):
        await edit("view", "a.png")


async def test_a_file_larger_than_ten_megabytes_is_refused(edit, tmp_path):
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate((10 << 20) + 1)
    with pytest.raises(ToolError, match="larger than 10 MiB"):
        await edit("view", "big.txt")


@pytest.mark.parametrize("command", ["view", "str_replace", "insert", "undo_edit"])
async def test_a_file_that_is_not_there_is_named(edit, command):
    with pytest.raises(ToolError, match="path: .*nowhere"):
        await edit(command, "nowhere", old_str="a", new_str="b", insert_line=0)


async def test_no_path_leads_out_of_the_workspace(edit, tmp_path):
    (tmp_path / "link").symlink_to("/etc")
    for path in ("/etc/passwd", "../x", "link/passwd"):
        with pytest.raises(OutsideWorkspace):
            await edit("view", path)


# --- create ---


async def test_a_new_file_gets_its_content_and_its_folders(edit, tmp_path):
    await edit("create", "new/deep/a.txt", file_text="grün\n")
    assert (tmp_path / "new/deep/a.txt").read_text() == "grün\n"


async def test_an_existing_file_is_not_overwritten(edit, tmp_path):
    (tmp_path / "a.txt").write_text("precious")
    with pytest.raises(ToolError, match="path: .*already"):
        await edit("create", "a.txt", file_text="")
    assert (tmp_path / "a.txt").read_text() == "precious"


async def test_a_new_file_needs_a_text(edit, tmp_path):
    with pytest.raises(ToolError, match="file_text"):
        await edit("create", "a.txt")
    assert not (tmp_path / "a.txt").exists()


async def test_a_link_to_nothing_can_be_followed_to_make_what_it_points_to(edit, tmp_path):
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to("sub/missing.txt")
    with pytest.raises(ToolError, match="use create"):
        await edit("str_replace", "link", old_str="x", new_str="y")
    await edit("create", "link", file_text="x\n")
    await edit("str_replace", "link", old_str="x", new_str="y")
    assert (tmp_path / "sub/missing.txt").read_text() == "y\n"
    with pytest.raises(ToolError, match="already"):
        await edit("create", "link", file_text="again")


async def test_taking_back_what_was_made_behind_a_link_leaves_the_link(edit, tmp_path):
    (tmp_path / "link").symlink_to("missing.txt")
    made = await edit("create", "link", file_text="x\n")
    assert "missing.txt" in made
    await edit("undo_edit", "missing.txt")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "missing.txt").exists()


# --- str_replace ---


async def test_a_text_is_replaced_and_its_surroundings_are_shown(edit, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n}\n" for n in range(1, 21)))
    text = await edit("str_replace", "a.txt", old_str="10\n", new_str="ten\nand more\n")
    assert (tmp_path / "a.txt").read_text().splitlines()[8:12] == ["9", "ten", "and more", "11"]
    shown = [line.split("\t") for line in text.splitlines() if "\t" in line]
    assert shown[0] == ["     6", "6"]
    assert shown[4:6] == [["    10", "ten"], ["    11", "and more"]]
    assert shown[-1][1] in ("14", "15")


async def test_without_a_new_text_the_old_one_is_removed(edit, tmp_path):
    (tmp_path / "a.txt").write_text("a b c\n")
    await edit("str_replace", "a.txt", old_str=" b")
    assert (tmp_path / "a.txt").read_text() == "a c\n"


async def test_a_text_that_is_there_more_than_once_is_refused_with_its_lines(edit, tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\nx\nx x\n")
    with pytest.raises(ToolError, match="old_str: .* 4 times, in lines 1, 3, 4, 4"):
        await edit("str_replace", "a.txt", old_str="x", new_str="z")


async def test_a_text_that_is_not_there_is_refused(edit, tmp_path):
    (tmp_path / "a.txt").write_text("abc\n")
    with pytest.raises(ToolError, match="old_str: it is not in the file"):
        await edit("str_replace", "a.txt", old_str="abd", new_str="z")


async def test_a_text_that_is_there_but_for_white_space_around_it_is_found(edit, tmp_path):
    (tmp_path / "a.txt").write_text("a\nb c\nd\n")
    await edit("str_replace", "a.txt", old_str="\n\nb c\n\n", new_str="\n\ne\n")
    assert (tmp_path / "a.txt").read_text() == "a\ne\nd\n"


@pytest.mark.parametrize(
    ("old", "new", "named"), [("a", "a", "new_str"), ("", "b", "old_str"), (None, "b", "old_str")]
)
async def test_a_replacement_that_cannot_be_meant_is_refused(edit, tmp_path, old, new, named):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ToolError, match=named):
        await edit("str_replace", "a.txt", old_str=old, new_str=new)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"a\r\nold\r\nb\r\n", b"a\r\nnew\r\nnewer\r\nb\r\n"),
        ("ä\nold\nb\n".encode("latin-1"), "ä\nnew\nnewer\nb\n".encode("latin-1")),
        (b"\xef\xbb\xbfa\nold\nb\n", b"\xef\xbb\xbfa\nnew\nnewer\nb\n"),
        (b"\xff\xfe" + "a\nold\nb".encode("utf-16-le"), b"\xff\xfe" + "a\nnew\nnewer\nb".encode("utf-16-le")),
        (b"a\nold\r\nb\r\n", b"a\nnew\r\nnewer\r\nb\r\n"),
    ],
    ids=["crlf", "latin-1", "utf-8 with mark", "utf-16", "mixed line ends"],
)
async def test_encoding_and_line_ends_stay(edit, tmp_path, before, after):
    (tmp_path / "a.txt").write_bytes(before)
    await edit("str_replace", "a.txt", old_str="old\nb", new_str="new\nnewer\nb")
    assert (tmp_path / "a.txt").read_bytes() == after


async def test_the_mode_of_a_file_stays(edit, tmp_path):
    (tmp_path / "a.sh").write_text("old\n")
    (tmp_path / "a.sh").chmod(0o755)
    await edit("str_replace", "a.sh", old_str="old", new_str="new")
    assert os.stat(tmp_path / "a.sh").st_mode & 0o777 == 0o755


# --- insert ---


@pytest.mark.parametrize(
    ("before", "line", "new", "after"),
    [
        ("a\nb\n", 0, "x", "x\na\nb\n"),
        ("a\nb\n", 1, "x\ny\n", "a\nx\ny\nb\n"),
        ("a\nb\n", 2, "x", "a\nb\nx\n"),
        ("a\nb", 2, "x", "a\nb\nx"),
        ("", 0, "x", "x\n"),
    ],
)
async def test_lines_are_inserted_after_a_line(edit, tmp_path, before, line, new, after):
    (tmp_path / "a.txt").write_text(before)
    await edit("insert", "a.txt", insert_line=line, new_str=new)
    assert (tmp_path / "a.txt").read_text() == after


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"insert_line": 3, "new_str": "x"}, "insert_line"),
        ({"insert_line": -1, "new_str": "x"}, "insert_line"),
        ({"new_str": "x"}, "insert_line"),
        ({"insert_line": 1}, "new_str"),
    ],
)
async def test_an_insertion_that_cannot_be_is_refused(edit, tmp_path, arguments, named):
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(ToolError, match=named):
        await edit("insert", "a.txt", **arguments)


# --- undo ---


async def test_changes_are_taken_back_one_by_one(edit, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"1\r\n")
    await edit("str_replace", "a.txt", old_str="1", new_str="2")
    await edit("insert", "a.txt", insert_line=1, new_str="3")
    await edit("undo_edit", "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"2\r\n"
    await edit("undo_edit", str(tmp_path / "a.txt"))
    assert (tmp_path / "a.txt").read_bytes() == b"1\r\n"
    with pytest.raises(ToolError, match="no change"):
        await edit("undo_edit", "a.txt")


async def test_taking_back_a_creation_removes_the_file(edit, tmp_path):
    await edit("create", "a.txt", file_text="x")
    await edit("undo_edit", "a.txt")
    assert not (tmp_path / "a.txt").exists()


async def test_a_refused_change_leaves_nothing_to_take_back(edit, tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ToolError):
        await edit("str_replace", "a.txt", old_str="b", new_str="c")
    with pytest.raises(ToolError, match="no change"):
        await edit("undo_edit", "a.txt")
