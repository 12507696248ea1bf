"""The git repository of a workspace, asked by the git program.

A repository is untrusted input: no hook, filter, fsmonitor, external diff or pager of it is run, nothing is
fetched, and no configuration of the machine or the repository takes part. Paths stand
behind `--` and are taken literally, and a revision cannot be an option. What git says is read NUL-separated. What
a diff looks like is ours, so that `git apply` takes it. Submodules are repositories of their own, and are looked
into one after the other.

A repository's own configuration decides too much and may be rubbish, so git gets another one in its place. It
has no switch for that, but it looks for `config` where GIT_COMMON_DIR leads: here to a folder of ours, whose
other entries lead to those of the repository. Of the repository's own it holds how files are stored, and nothing
of how things are shown or what is run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Literal

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    LimitExceeded,
    PathNotFound,
    StateConflict,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.results import GitChange
from agent_sdk.workspace.contract import Git
from agent_sdk.workspace.disk import in_thread, path_error
from agent_sdk.workspace.environment import encode
from agent_sdk.workspace.paths import Root

KEPT = frozenset(
    f"core.{name}"
    for name in (
        *("repositoryformatversion", "filemode", "symlinks", "ignorecase", "precomposeunicode"),
        *("autocrlf", "eol", "excludesfile", "attributesfile", "sparsecheckout", "sparsecheckoutcone"),
    )
)
_NOT_KEPT = ("extensions.worktreeconfig", "extensions.partialclone")
"""Extensions by which git would read more configuration, or fetch."""
_OURS = "[core]\nquotePath = false\n"
_NEEDED = ("objects", "refs")
_SHARED = (*_NEEDED, "packed-refs", "reftable", "info", "logs", "shallow", "worktrees")
_LONGEST = 4096


def make_view(folder: str) -> str:
    """Return a new folder for GIT_COMMON_DIR, with which git finds a repository and reads nothing of it. Blocks."""
    view = os.path.join(folder, f"git-{new_id()}")
    os.mkdir(view, 0o700)
    for name in _NEEDED:
        os.mkdir(os.path.join(view, name))
    return view


def fill_view(view: str, common: str, values: Mapping[str, str | None]) -> None:
    """Let it lead to what all worktrees of a repository share, and take over what is kept of its values. Blocks."""
    for name in _NEEDED:
        os.rmdir(os.path.join(view, name))
    for name in _SHARED:
        os.symlink(os.path.join(common, name), os.path.join(view, name))
    kept = "".join(_line(key, value) for key, value in values.items() if _is_kept(key))
    with open(os.path.join(view, "config"), "xb") as file:
        file.write(os.fsencode(_OURS + kept))


def common_folder(git_dir: str) -> str:
    """Return where a repository has what its worktrees share. Blocks."""
    with suppress(OSError):
        descriptor = os.open(os.path.join(git_dir, "commondir"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return os.path.join(git_dir, os.fsdecode(file.read(_LONGEST)).rstrip("\r\n"))
    return git_dir


def read_values(listing: bytes) -> dict[str, str | None]:
    """Return what `git config -z --list` says; None: a key that stands alone."""
    found: dict[str, str | None] = {}
    for entry in os.fsdecode(listing).split("\0")[:-1]:
        key, equals, value = entry.partition("\n")
        found[key] = value if equals else None
    return found


def _is_kept(key: str) -> bool:
    extension = key.startswith("extensions.") and key.count(".") == 1
    return key in KEPT or (extension and key not in _NOT_KEPT)


def _line(key: str, value: str | None) -> str:
    section, _, name = key.rpartition(".")
    if value is None:
        return f"[{section}]\n{name}\n"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'[{section}]\n{name} = "{quoted}"\n'


DIFF_BYTES = 1 << 20
UNTRACKED_SHOWN = 100
LISTING_BYTES = 64 << 20
BASE_LENGTH = 256

_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_COUNT": "0",
    "GIT_CONFIG_PARAMETERS": "",
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "LC_ALL": "C",
}
_DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty")
_SUBMODULES_MAX = 200
_GITLINK = b"160000 "
_STATUS: dict[str, Literal["added", "modified", "deleted", "renamed"]] = {
    "A": "added",
    "C": "added",
    "D": "deleted",
    "R": "renamed",
}


RunGit = Callable[[list[str], str, dict[str, str], int], Awaitable[tuple[int | None, bytes, str]]]
"""Runs arguments in a folder with more environment; gives exit code, output (cut after a limit), complaints."""


class LocalGit(Git):
    """Implements `workspace.Git`."""

    def __init__(
        self, root: Root, run: RunGit, temporary: Callable[[], str], *, isolated: bool = False
    ) -> None:
        """Take where and how git is run.

        Args:
            root: of the workspace.
            run: runs git.
            temporary: says where a folder can be made that is needed as long as git is asked.
            isolated: nothing but the workspace is at stake here, so that repositories of other users are read, too.
        """
        self._root = root
        self._run = run
        self._temporary = temporary
        self._isolated = isolated

    async def changes(self, path: str = ".", *, base: str | None = None) -> list[GitChange]:
        found: dict[str, GitChange] = {}
        async with self._views() as views:
            async for place, tree in self._places(path, base, views):
                tracked = await place.git(*_DIFF, "--name-status", "-z", tree, "--", *place.spec)
                found |= {change.path: change for change in _tracked(tracked, place.shown)}
                for name in await place.untracked():
                    shown = place.shown(name)
                    found[shown] = GitChange(path=shown, status="untracked")
        return sorted(found.values(), key=lambda change: change.path)

    async def diff(self, path: str = ".", *, base: str | None = None) -> str:
        """Return the unified diff against `base`; untracked files are shown as new ones."""
        text = b""
        async with self._views() as views:
            async for place, tree in self._places(path, base, views):
                text += await place.git(
                    *_DIFF, *place.prefixes, tree, "--", *place.spec, limit=DIFF_BYTES + 1
                )
                untracked = await place.untracked()
                for name in untracked[:UNTRACKED_SHOWN]:
                    if len(text) > DIFF_BYTES:
                        break
                    text += await place.as_new(name)
                if len(untracked) > UNTRACKED_SHOWN and len(text) <= DIFF_BYTES:
                    text += f"[... {len(untracked) - UNTRACKED_SHOWN} more untracked files ...]\n".encode()
                if len(text) > DIFF_BYTES:
                    break
        return _cut(text)

    @asynccontextmanager
    async def _views(self) -> AsyncIterator[str]:
        """Make a folder for the configurations that git gets, and remove it."""
        import shutil  # noqa: PLC0415  1 MB of compression modules, for who looks at a repository

        parent = self._temporary()
        views = os.path.join(parent, f"git-{new_id()}")
        try:
            await in_thread(os.mkdir, views, 0o700)
            yield views
        except AgentServerError:
            raise
        except OSError as exc:
            raise path_error(exc, parent) from exc
        finally:
            await in_thread(shutil.rmtree, views, True)

    async def _places(self, path: str, base: str | None, views: str) -> AsyncIterator[tuple[_Place, str]]:
        """Yield the repository of a path and the submodules below it, each with the tree to compare it with."""
        place = await self._place(path, views)
        left = [(place, await place.tree(base))]
        for _ in range(_SUBMODULES_MAX):
            if not left:
                return
            place, tree = left.pop(0)
            yield place, tree
            left += [(inner, await inner.tree_of(commit)) async for inner, commit in place.submodules(tree)]

    async def _place(self, path: str, views: str) -> _Place:
        folder, rest = await in_thread(self._deepest_folder, path)
        place = _Place(self._run, self._root.home, folder, views, rest, isolated=self._isolated)
        await place.find_top(path)
        return place

    def _deepest_folder(self, path: str) -> tuple[str, str]:
        """Return the folder where git is asked and what is left of the path, which may have been deleted."""
        rest: list[str] = []
        while True:
            try:
                with self._root.entry(path) as entry:
                    place = self._root.absolute(entry.names)
                    if entry.stat() is not None and os.path.isdir(place):
                        return place, "/".join(rest)
                    return os.path.dirname(place), "/".join((os.path.basename(place), *rest))
            except PathNotFound:
                path, _, name = path.rstrip("/").rpartition("/")
                if not path or name in ("", ".", ".."):
                    raise
                rest.insert(0, name)


class _Place:
    """A folder in a repository."""

    def __init__(
        self,
        run: RunGit,
        home: str,
        folder: str,
        views: str,
        rest: str = "",
        *,
        isolated: bool,
        within: str = "",
    ) -> None:
        """Describe it.

        Args:
            run: runs git.
            home: of the workspace, to which paths are relative.
            folder: where git is asked.
            views: a folder for the configuration that git gets.
            rest: of the path that is asked about.
            isolated: see LocalGit.
            within: the path to this submodule from the top of the outermost repository, with a slash at its end.
        """
        self._run = run
        self._home = home
        self._folder = folder
        self._views = views
        self.spec = (rest or ".",)
        self._within = within
        self.prefixes = (f"--src-prefix=a/{within}", f"--dst-prefix=b/{within}")
        self._isolated = isolated
        self._safe = ("--no-pager", *(("-c", "safe.directory=*") if isolated else ()))
        self._top = ""
        self._environment = _ENVIRONMENT

    async def find_top(self, path: str) -> None:
        """Find the repository, and give git a configuration for it.

        Raises:
            StateConflict: there is none, it is damaged, or it belongs to somebody else.
            WorkspaceUnavailable: there is no git.
        """
        view = await in_thread(make_view, self._views)
        self._environment = {**_ENVIRONMENT, "GIT_COMMON_DIR": view}
        code, out, err = await self._ask("rev-parse", "--absolute-git-dir")
        if code not in (0, 127) and "dubious ownership" in err:
            self._safe += await self._trusted()
            code, out, err = await self._ask("rev-parse", "--absolute-git-dir")
        if code == 127:
            raise WorkspaceUnavailable("git is needed for this, and is not installed")
        if code != 0 and "dubious ownership" in err:
            raise StateConflict(
                f"the repository belongs to another user: {path}; if you trust it: "
                "git config --global --add safe.directory FOLDER",
                state="not trusted",
            )
        if code != 0:
            raise _unusable(path, err)
        git_dir = os.fsdecode(out.removesuffix(b"\n"))
        common = await in_thread(common_folder, git_dir)
        values = await self._values(path, common)
        if common != git_dir:  # that of the repository is not for its worktrees
            values.pop("core.worktree", None)
        if "extensions.worktreeconfig" in values:
            values |= await self._values(path, git_dir, "config.worktree")
        await in_thread(fill_view, view, common, values)
        code, out, err = await self._ask("rev-parse", "--show-toplevel")
        if code != 0:
            raise _unusable(path, err.replace(view, git_dir))
        self._top = os.fsdecode(out.removesuffix(b"\n"))
        files = os.path.join(git_dir, values.get("core.worktree") or self._top)
        if not await in_thread(_same, files, self._top):
            raise StateConflict(
                f"the repository at {path} says that its files are elsewhere (core.worktree); remove that from its "
                "configuration",
                state="not trusted",
            )

    async def _values(self, path: str, folder: str, name: str = "config") -> dict[str, str | None]:
        """What a file says that configures the repository; nothing where there is none.

        Raises:
            StateConflict: git cannot read it.
        """
        file = os.path.join(folder, name)
        if not await in_thread(os.path.isfile, file):
            return {}
        code, out, err = await self._ask("config", "--file", file, "--includes", "-z", "--list")
        if code != 0:
            raise _unusable(path, err)
        return read_values(out)

    async def _trusted(self) -> tuple[str, ...]:
        """Which folders of others the user of this machine has said to trust."""
        found: list[str] = []
        for scope in ("--system", "--global"):
            _, out, _ = await self._run(
                ["git", "config", scope, "-z", "--get-all", "safe.directory"], "/", {}, LISTING_BYTES
            )
            found += [os.fsdecode(value) for value in out.split(b"\0")[:-1]]
        return tuple(word for value in found for word in ("-c", f"safe.directory={value}"))

    async def submodules(self, tree: str) -> AsyncIterator[tuple[_Place, str]]:
        """Yield the submodules that are there, each with its commit in the tree (empty: none)."""
        listing = await self.git("ls-files", "--stage", "-z", "--full-name", "--", *self.spec)
        names = [entry.partition(b"\t")[2] for entry in listing.split(b"\0") if entry.startswith(_GITLINK)]
        for name in dict.fromkeys(map(os.fsdecode, names)):
            folder = os.path.join(self._top, name)
            if not await in_thread(_is_checked_out, folder):
                continue
            within = f"{self._within}{name}/"
            inner = _Place(self._run, self._home, folder, self._views, isolated=self._isolated, within=within)
            try:
                await inner.find_top(folder)
            except StateConflict:  # what it was is told by the repository around it
                continue
            if await in_thread(os.path.samefile, inner._top, folder):
                code, out, _ = await self._ask("rev-parse", "--verify", "--quiet", f"{tree}:{name}")
                yield inner, out.decode().strip() if code == 0 else ""

    async def tree_of(self, commit: str) -> str:
        """Return the id of a commit's tree; that of HEAD when it is not here."""
        if commit:
            code, out, _ = await self._ask("rev-parse", "--verify", "--quiet", f"{commit}^{{tree}}")
            if code == 0:
                return out.decode().strip()
        return await self.tree(None)

    async def tree(self, base: str | None) -> str:
        """Return the id of the tree to compare with.

        Raises:
            InvalidParams: there is no such revision.
        """
        if base is not None:
            _check_base(base)
        wanted = base or "HEAD"
        code, out, _ = await self._ask(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"{wanted}^{{tree}}"
        )
        if code == 0:
            return out.decode().strip()
        if base is not None:
            raise InvalidParams(f"base: no such revision: {base}")
        return (await self.git("hash-object", "--no-filters", "-t", "tree", "/dev/null")).decode().strip()

    async def untracked(self) -> list[bytes]:
        """Return the untracked files, relative to the top of the repository, sorted."""
        only = ("--others", "--exclude-standard", "-z", "--full-name")
        return sorted(filter(None, (await self.git("ls-files", *only, "--", *self.spec)).split(b"\0")))

    async def as_new(self, name: bytes) -> bytes:
        """Return the diff that would add an untracked file."""
        pair = (*self.prefixes, "--no-index", "--", "/dev/null", os.fsdecode(name))
        return await self.git("-C", self._top, *_DIFF, *pair, limit=DIFF_BYTES + 1, fine=(0, 1))

    async def git(
        self, *arguments: str, limit: int = LISTING_BYTES, fine: tuple[int | None, ...] = (0,)
    ) -> bytes:
        """Return what git says.

        Raises:
            StateConflict: git cannot do it.
        """
        code, out, err = await self._ask(*arguments, limit=limit)
        if code not in fine and len(out) < limit:
            raise StateConflict(f"git {arguments[0]}: {err.strip()[:500]}", state="git failed")
        if len(out) >= LISTING_BYTES:
            sentence = f"git {arguments[0]} says more than {LISTING_BYTES} bytes; look at a folder in it"
            raise LimitExceeded(sentence, field="path", limit=LISTING_BYTES)
        return out

    async def _ask(self, *arguments: str, limit: int = LISTING_BYTES) -> tuple[int | None, bytes, str]:
        return await self._run(["git", *self._safe, *arguments], self._folder, self._environment, limit)

    def shown(self, name: bytes) -> str:
        """Return a path of the repository as a path of the workspace."""
        path = os.path.join(os.fsencode(self._top), name)
        relative = os.path.relpath(path, os.fsencode(self._home))
        return relative.decode("utf-8", "backslashreplace")


def _is_checked_out(folder: str) -> bool:
    return not os.path.islink(folder) and os.path.lexists(os.path.join(folder, ".git"))


def _tracked(listing: bytes, shown: Callable[[bytes], str]) -> Iterator[GitChange]:
    words = iter(listing.split(b"\0"))
    for word in words:
        letter = word[:1].decode()
        if not letter:
            return
        old = next(words) if letter in "RC" else None
        status = _STATUS.get(letter, "modified")
        yield GitChange(
            path=shown(next(words)),
            status=status,
            old_path=shown(old) if old is not None and status == "renamed" else None,
        )


def _check_base(base: str) -> None:
    encode(base, "base")
    if not 1 <= len(base) <= BASE_LENGTH:
        raise InvalidParams(f"base: 1..{BASE_LENGTH} characters (got {len(base)})")
    if base.startswith("-") or ":" in base:
        raise InvalidParams(f"base: not a revision: {base}")


def _cut(text: bytes) -> str:
    if len(text) <= DIFF_BYTES:
        return text.decode(errors="replace")
    note = b"[... the rest of the diff is left out ...]\n"
    kept = text[: DIFF_BYTES - len(note)]
    return (kept[: kept.rfind(b"\n") + 1] + note).decode(errors="replace")


def _same(folder: str, other: str) -> bool:
    """Whether two paths lead to the same place. Blocks."""
    return os.path.realpath(folder) == os.path.realpath(other)


def _unusable(path: str, err: str) -> StateConflict:
    words = err.strip().removeprefix("fatal: ")[:200]
    problem = (
        f"not a git repository: {path}"
        if "not a git repository" in words
        else f"git cannot use the repository at {path}: {words.partition(chr(10))[0] or 'it does not say why'}"
    )
    return StateConflict(problem, state="no repository", reason=words)
