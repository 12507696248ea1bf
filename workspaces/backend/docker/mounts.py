"""What is mounted of this machine into a sandbox: looked at when it starts, and again when it has started.

Clients may own what they have mounted, and swap a folder for a symlink at any moment. The engine follows that; so
what is allowed is walked to without symlinks, and what the sandbox has got has to be the very same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

from agent_sdk.protocol.errors import InvalidParams, PolicyDenied

_PASS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Source(NamedTuple):
    """Which file or folder is to be at a place of a sandbox."""

    target: str
    device: int
    inode: int


def sources(mounts: Iterable[str], allowed: Iterable[str]) -> tuple[Source, ...]:
    """Return what the mounts of a sandbox are at this moment. Blocks.

    Raises:
        PolicyDenied: one is not below an allowed folder, or a symlink is on the way.
        InvalidParams: it is not there any more.
    """
    tops = [os.path.realpath(folder) for folder in allowed]
    pairs = [mount.split(":")[:2] for mount in mounts]
    return tuple(_source(source, target, tops) for source, target in pairs)


def _source(source: str, target: str, tops: Iterable[str]) -> Source:
    top = next((top for top in tops if source == top or source.startswith(f"{top.rstrip('/')}/")), None)
    if top is None:
        raise PolicyDenied(
            f"sandbox.mounts: {source[:200]} is not below a folder this server allows; "
            "its option sandbox_mounts says which"
        )
    with ExitStack() as stack:
        try:
            here = _opened(stack, top, None)
            for name in filter(None, source[len(top) :].split("/")):
                here = _opened(stack, name, here)
                if stat.S_ISLNK(os.fstat(here).st_mode):
                    raise PolicyDenied(
                        f"sandbox.mounts: {source[:200]} leads elsewhere by now: {name[:200]} is a symlink; "
                        "put back what was there, or make another conversation"
                    )
            found = os.fstat(here)
        except FileNotFoundError:
            raise InvalidParams(
                f"sandbox.mounts: there is no {source[:200]} on the server's machine any more"
            ) from None
    return Source(target, found.st_dev, found.st_ino)


def _opened(stack: ExitStack, name: str, folder: int | None) -> int:
    descriptor = os.open(name, _PASS, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor
