"""What every workspace promises about the git repository in it."""

import pytest

from agent_sdk.protocol.errors import InvalidParams, StateConflict
from agent_sdk.protocol.results import GitChange

COMMIT = "git add -A && git -c user.name=n -c user.email=e@x commit -qm message"
START = f"git init -q && mkdir sub && seq 1 50 > old && echo 1 > changed && echo 2 > sub/gone && {COMMIT}"


class RepositoryContract:
    """Mixed into WorkspaceContract."""

    async def test_all_that_differs_from_the_last_commit_is_told(self, workspace):
        await workspace.execute(
            f"{START}; git mv old sub/new; echo x >> changed; rm sub/gone; echo u > 'un tracked'"
        )
        assert await workspace.git.changes() == [
            GitChange(path="changed", status="modified"),
            GitChange(path="sub/gone", status="deleted"),
            GitChange(path="sub/new", status="renamed", old_path="old"),
            GitChange(path="un tracked", status="untracked"),
        ]

    async def test_a_clean_repository_has_no_changes(self, workspace):
        await workspace.execute(START)
        assert (await workspace.git.changes(), await workspace.git.diff()) == ([], "")

    async def test_before_the_first_commit_everything_is_new(self, workspace):
        await workspace.execute(
            "git init -q; echo a > staged; git add staged; echo b > loose; echo x > .gitignore; touch x"
        )
        assert await workspace.git.changes() == [
            GitChange(path=".gitignore", status="untracked"),
            GitChange(path="loose", status="untracked"),
            GitChange(path="staged", status="added"),
        ]
        assert "+a" in await workspace.git.diff("staged")

    async def test_a_diff_shows_changed_new_and_deleted_files(self, workspace):
        await workspace.execute(f"{START}; echo more >> changed; rm sub/gone; echo fresh > new")
        diff = await workspace.git.diff()
        assert "+more" in diff
        assert "+++ b/new\n@@ -0,0 +1 @@\n+fresh\n" in diff
        assert "deleted file mode" in diff

    async def test_changes_are_limited_to_a_path_and_named_from_the_root(self, workspace):
        await workspace.execute(f"{START}; echo x >> changed; echo y >> sub/gone; echo z > sub/z")
        assert [change.path for change in await workspace.git.changes("sub")] == ["sub/gone", "sub/z"]
        assert "changed" not in await workspace.git.diff("sub/gone")

    async def test_a_deleted_file_has_a_diff(self, workspace):
        await workspace.execute(f"{START}; rm -r sub")
        assert "-2\n" in await workspace.git.diff("sub/gone")

    async def test_changes_since_any_revision_are_told(self, workspace):
        await workspace.execute(f"{START}; echo x > second; {COMMIT}")
        assert await workspace.git.changes(base="HEAD~1") == [GitChange(path="second", status="added")]

    async def test_a_repository_in_a_folder_is_asked_by_its_path(self, workspace):
        await workspace.execute("mkdir -p a/repo; cd a/repo; git init -q; echo x > f")
        assert await workspace.git.changes("a/repo") == [GitChange(path="a/repo/f", status="untracked")]

    @pytest.mark.parametrize("name", ["-x", "new\nline", "é", "$(id)", ":(top)x", "a;b"])
    async def test_any_name_is_taken_literally(self, workspace, name):
        await workspace.execute(f"git init -q; {COMMIT} --allow-empty")
        await workspace.files.write(name, b"x\n")
        await workspace.files.write("other", b"x\n")
        assert await workspace.git.changes(name) == [GitChange(path=name, status="untracked")]
        assert "+x" in await workspace.git.diff(name)

    async def test_a_folder_without_a_repository_is_a_conflict(self, workspace):
        with pytest.raises(StateConflict, match="not a git repository"):
            await workspace.git.changes()

    @pytest.mark.parametrize("base", ["--output=x", "-h", "nope", "HEAD:changed", "HEAD..HEAD"])
    async def test_what_is_no_revision_is_refused(self, workspace, base):
        await workspace.execute(START)
        with pytest.raises(InvalidParams, match="base"):
            await workspace.git.diff(base=base)

    async def test_nothing_of_the_repositorys_configuration_is_run(self, workspace):
        await workspace.execute(START)
        await workspace.files.write("evil", b"#!/bin/sh\ntouch pwned; cat", mode=0o755)
        await workspace.files.write(".gitattributes", b"* diff=evil\n")
        keys = "core.fsmonitor core.pager diff.external diff.evil.textconv diff.evil.command core.editor"
        await workspace.execute(f"for key in {keys}; do git config $key $PWD/evil; done")
        await workspace.execute("mkdir h; cp evil h/post-index-change; git config core.hooksPath $PWD/h")
        await workspace.execute("echo x >> changed; rm -f pwned")
        await workspace.git.changes()
        assert "+x" in await workspace.git.diff()
        assert (await workspace.execute("ls pwned")).exit_code != 0

    async def test_a_very_long_diff_is_cut(self, workspace):
        await workspace.execute("git init -q; seq 1 300000 > long")
        diff = await workspace.git.diff()
        assert len(diff.encode()) <= 1 << 20
        assert diff.endswith("left out ...]\n")
