"""What a workspace promises that is confined to a folder: nothing leads out of it.

What is outside does not exist here: so a promise that is broken breaks nothing else.
"""

import pytest

from agent_sdk.protocol.errors import OutsideWorkspace

OUTSIDE = [
    "..",
    "../x",
    "/no/such/file",
    "/",
    "a/../../x",
    "out/file",
    "deep/out/file",
    "up/x",
    "//no/such/file",
]


class ConfinementContract:
    """Mixed into WorkspaceContract; not for a workspace whose root is that of all files."""

    @pytest.mark.place
    async def test_it_says_that_paths_are_kept_in_it(self, workspace):
        assert (await workspace.describe()).confined

    @pytest.mark.place
    async def test_its_root_is_a_part_of_all_files(self, workspace):
        assert (await workspace.describe()).root != "/"

    @pytest.mark.place
    @pytest.mark.parametrize("verb", ["read", "write", "list", "remove", "mkdir", "stat", "move"])
    async def test_no_path_leads_out_of_the_workspace(self, workspace, verb):
        await workspace.execute(
            "mkdir a deep; touch here; ln -s /no/such out; ln -s ../out deep/out; ln -s .. up"
        )
        for path in OUTSIDE:
            arguments = {"write": (path, b"x"), "move": ("here", path)}.get(verb, (path,))
            with pytest.raises(OutsideWorkspace) as caught:
                await getattr(workspace.files, verb)(*arguments)
            assert isinstance(caught.value, PermissionError)

    @pytest.mark.place
    @pytest.mark.parametrize("verb", ["read", "write", "list", "mkdir"])
    async def test_a_symlink_out_of_the_workspace_is_not_followed(self, workspace, verb):
        await workspace.execute("ln -s /no/such/file out")
        with pytest.raises(OutsideWorkspace):
            await getattr(workspace.files, verb)("out", *((b"x",) if verb == "write" else ()))
        assert (await workspace.files.stat("out")).target == "/no/such/file"
        await workspace.files.remove("out")

    @pytest.mark.place
    @pytest.mark.parametrize("path", ["../f", "/no/such/file", "out/f"])
    async def test_nothing_travels_to_or_from_outside(self, workspace, tmp_path, path):
        await workspace.execute("ln -s /no/such out")
        (tmp_path / "source").write_bytes(b"x")
        with pytest.raises(OutsideWorkspace):
            await workspace.upload(tmp_path / "source", path)
        with pytest.raises(OutsideWorkspace):
            await workspace.download(path, tmp_path / "copy")

    @pytest.mark.place
    async def test_no_command_starts_outside(self, workspace):
        await workspace.execute("ln -s /etc out; mkdir a")
        for cwd in ("..", "/", "/etc", "a/../..", "out"):
            with pytest.raises(OutsideWorkspace):
                await workspace.execute("true", cwd=cwd)
            with pytest.raises(OutsideWorkspace):
                await workspace.start("true", cwd=cwd)

    @pytest.mark.place
    async def test_a_repository_outside_is_refused(self, workspace):
        with pytest.raises(OutsideWorkspace):
            await workspace.git.changes("..")
