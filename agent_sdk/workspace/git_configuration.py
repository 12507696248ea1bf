"""The configuration that git gets in the place of a repository's own, which decides too much and may be rubbish.

Git has no switch for that, but it looks for `config` where GIT_COMMON_DIR leads: here to a folder of ours, whose
other entries lead to those of the repository. Of the repository's own it holds how files are stored, and nothing
of how things are shown or what is run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress

from agent_sdk.ids import new_id

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
