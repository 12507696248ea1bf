"""What every workspace promises about the git repository in it."""

import pytest

from agent_sdk.protocol.errors import InvalidParams, StateConflict
from agent_sdk.protocol.results import GitChange
from agent_sdk.workspace.git import KEPT

COMMIT = "git add -A && git -c user.name=n -c user.email=e@x commit -qm message"
START = f"git init -q && mkdir sub && seq 1 50 > old && echo 1 > changed && echo 2 > sub/gone && {COMMIT}"
SHOWS = ("diff", "core", "color", "status", "log", "i18n", "pager", "column")
UNLIKE = {*KEPT, "core.worktree"}
"""Those that count, and are refused when they are rubbish."""
OWN_KEYS = [
    *(f"diff.own.{name}" for name in ("command", "textconv", "binary", "xfuncname", "funcname", "wordRegex")),
    *(f"color.diff.{slot}" for slot in ("new", "old", "meta", "frag", "whitespace")),
]


class RepositoryContract:
    """Mixed into WorkspaceContract."""

    @pytest.mark.place
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

    async def test_a_repository_whose_files_are_said_to_be_elsewhere_is_refused(self, workspace):
        await workspace.execute(f"{START}; mkdir elsewhere; git config core.worktree $PWD/elsewhere")
        for ask in (workspace.git.changes, workspace.git.diff):
            with pytest.raises(StateConflict, match="files are elsewhere"):
                await ask("sub")
        await workspace.execute("git config --unset core.worktree; git config core.fileMode bogus")
        with pytest.raises(StateConflict, match="git cannot use the repository.*bogus"):
            await workspace.git.changes()

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

    @pytest.mark.place
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

    @pytest.mark.place
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

    async def test_no_filter_of_the_repository_is_run(self, workspace):
        await workspace.execute(START)
        await workspace.files.write("evil", b"#!/bin/sh\ntouch $(dirname $0)/pwned; cat", mode=0o755)
        for configured in (
            'git config filter.evil.clean "$PWD/evil"',
            'git config filter.evil.process "$PWD/evil"; git config filter.evil.required true',
            'git config "filter.evil.i\'l.clean" "$PWD/evil"; name=".i\'l"',
            'git config -f more filter.evil.clean "$PWD/evil"; git config include.path ../more',
            'git config extensions.worktreeConfig true; git config --worktree filter.evil.clean "$PWD/evil"',
            'git config filter.a=b.clean "$PWD/evil"; name=" filter=a=b"',
        ):
            await workspace.execute(
                f'cp .git/config kept; {configured}; echo "* filter=evil$name" > .gitattributes; echo x >> changed'
            )
            assert "changed" in [change.path for change in await workspace.git.changes()]
            assert "+x" in await workspace.git.diff()
            assert (await workspace.execute("mv kept .git/config; ls pwned")).exit_code != 0, configured

    @pytest.mark.parametrize(
        "rubbish", ["zz", "-5", "%", None], ids=["a word", "a number", "a sign", "nothing"]
    )
    async def test_rubbish_in_the_configuration_of_the_repository_changes_nothing(self, workspace, rubbish):
        await workspace.execute(
            f"{START}; git mv old sub/new; seq 60 > long; echo é > 'sub/é'; {COMMIT}; "
            "git mv sub/new new; sed -i 's/^7$/seven/; s/^40$//' long; echo ü > 'sub/é'; echo n > 'un é'"
        )
        await workspace.execute("echo '* diff=own merge=own' > .gitattributes")
        clean = (await workspace.git.changes(), await workspace.git.diff())
        keys = [*(await workspace.execute("git help --config")).stdout.split(), *OWN_KEYS]
        keys = [key for key in keys if key.partition(".")[0] in SHOWS and key.lower() not in UNLIKE]
        assert len(keys) > 150
        lines = ["[alias]", "diff = !touch pwned", "rev-parse = zz", "[include]", "path = nowhere"]
        for key in keys:
            section, _, name = key.replace("*", "x").replace("<", "").replace(">", "").rpartition(".")
            section, _, part = section.partition(".")
            lines += [f'[{section} "{part}"]' if part else f"[{section}]"]
            lines += [name if rubbish is None else f"{name} = {rubbish}"]
        await workspace.execute("cat >> .git/config", stdin="\n".join(lines) + "\n")
        assert (await workspace.execute("git diff")).exit_code != 0, "git itself gives up"
        assert (await workspace.git.changes(), await workspace.git.diff()) == clean

    async def test_a_configuration_that_git_cannot_read_is_told_in_a_sentence(self, workspace):
        await workspace.execute(f"{START}; echo '[core' >> .git/config")
        for ask in (workspace.git.changes, workspace.git.diff):
            with pytest.raises(
                StateConflict, match=r"^git cannot use the repository at \.: bad config line \d+ in"
            ):
                await ask()

    async def test_how_a_repository_stores_files_counts(self, workspace):
        await workspace.execute(
            f"{START}; chmod 755 changed; printf '1\r\n' > changed; echo o > out; echo out > .git/own"
        )
        assert len(await workspace.git.changes()) == 2
        await workspace.execute(
            "printf '[core]\nautocrlf\nfileMode = no\n' > .git/part; git config include.path part; "
            "git config core.excludesFile .git/own"
        )
        assert await workspace.git.changes() == []

    async def test_worktrees_of_a_repository_are_repositories(self, workspace):
        await workspace.execute(
            f"mkdir main; cd main; {START}; git config extensions.worktreeConfig true; "
            "git worktree add -q ../second; git config core.abbrev zz; cd ../second; echo x >> changed"
        )
        assert await workspace.git.changes("second") == [GitChange(path="second/changed", status="modified")]
        assert await workspace.git.changes("second", base="second") == await workspace.git.changes("second")
        assert await workspace.git.changes("main") == []

    async def test_nothing_is_fetched_for_a_repository_that_misses_objects(self, workspace):
        command = "touch $PWD/ran #"
        await workspace.execute(
            f"{START}; git config core.repositoryFormatVersion 1; git config extensions.partialClone origin; "
            f"git config remote.origin.promisor true; git config remote.origin.uploadpack '{command}'; "
            f"git config core.sshCommand '{command}'; git config protocol.allow always; "
            "rm -f .git/objects/$(git rev-parse HEAD:changed | sed 's,^..,&/,'); echo x >> changed"
        )
        for url in ("ext::touch ran", ".", "ssh://nowhere/x"):
            await workspace.execute(f"git config remote.origin.url '{url}'")
            with pytest.raises(StateConflict, match="git diff: "):
                await workspace.git.diff()
            assert (await workspace.execute("ls ran")).exit_code != 0, url

    async def test_a_diff_can_be_applied_whatever_the_repository_likes(self, workspace):
        await workspace.execute(
            f"{START}; sed -i 's/^7$/seven/; s/^40$//' old; echo two >> sub/gone; echo new > sub/n"
        )
        before = (await workspace.execute("cat old sub/gone sub/n")).stdout
        plain = await workspace.git.diff()
        assert plain.startswith("diff --git a/old b/old\n")
        undone = await workspace.execute("git checkout -q . && rm sub/n && git apply", stdin=plain)
        assert (undone.stderr, undone.exit_code) == ("", 0)
        assert (await workspace.execute("cat old sub/gone sub/n")).stdout == before
        await workspace.execute("echo sub > order; echo order >> .git/info/exclude")
        for tastes in (
            "diff.noprefix=true color.diff=always diff.relative=true diff.context=0 diff.submodule=log",
            "diff.mnemonicPrefix=true color.ui=always diff.renames=copies diff.interHunkContext=100",
            "diff.orderFile=order diff.wordRegex=. diff.colorMoved=zebra diff.suppressBlankEmpty=true",
        ):
            await workspace.execute(
                f'for taste in {tastes}; do git config ${{taste%=*}} "${{taste#*=}}"; done'
            )
            assert await workspace.git.diff() == plain, tastes

    async def test_edits_in_a_submodule_are_told(self, workspace):
        await workspace.execute(
            f"{START}; mkdir inner; cd inner; git init -q; echo 1 > file; mkdir deep; cd deep; git init -q; "
            f"echo 1 > low; {COMMIT}; cd ..; {COMMIT}; cd ..; {COMMIT}"
        )
        assert (await workspace.git.changes(), await workspace.git.diff()) == ([], "")
        await workspace.execute("echo 2 >> inner/file; echo 2 >> inner/deep/low; echo n > inner/deep/new")
        assert await workspace.git.changes() == [
            GitChange(path="inner/deep/low", status="modified"),
            GitChange(path="inner/deep/new", status="untracked"),
            GitChange(path="inner/file", status="modified"),
        ]
        diff = await workspace.git.diff()
        for name in ("inner/file", "inner/deep/low", "inner/deep/new"):
            assert f"diff --git a/{name} b/{name}" in diff
        await workspace.execute(f"cd inner/deep; {COMMIT}")
        told = [change.path for change in await workspace.git.changes()]
        assert told == ["inner/deep", "inner/deep/low", "inner/deep/new", "inner/file"]

    async def test_nothing_that_a_submodule_configures_is_run(self, workspace):
        await workspace.execute(
            f"{START}; mkdir inner; cd inner; git init -q; echo 1 > f; {COMMIT}; cd ..; {COMMIT}"
        )
        await workspace.execute(
            "cd inner; echo '* filter=x' > .gitattributes; echo 2 >> f; "
            'for key in filter.x.clean core.fsmonitor diff.external; do git config $key "touch $PWD/ran; cat"; done'
        )
        assert "inner/f" in [change.path for change in await workspace.git.changes()]
        assert "+2" in await workspace.git.diff()
        assert (await workspace.execute("ls inner/ran")).exit_code != 0

    async def test_a_very_long_diff_is_cut(self, workspace):
        await workspace.execute("git init -q; seq 1 300000 > long")
        diff = await workspace.git.diff()
        assert len(diff.encode()) <= 1 << 20
        assert diff.endswith("left out ...]\n")
