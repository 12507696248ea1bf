"""The name of the box that lives, or of the next one: it is written down with every call before that begins in the box.

When a server ends, a call that was written down may have begun or not. As long as a name is promised, nothing that was
written down with it has begun: the next server gives its box the same name, and the calls begin there. A promise
is a file; it is gone for good before the first call is sent.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from agent_sdk.ids import new_id


class BoxName:
    """The name of the box that lives, or of the next one. Blocks for some system calls."""

    def __init__(self, file: Path) -> None:
        """Take the file of the promise; what a former server has promised is kept."""
        self._file = file
        try:
            self.value = file.read_text()
        except (OSError, UnicodeError):
            self.value = ""
        self.promised = bool(self.value)
        """Whether nothing that was written down with this name has begun."""
        self.value = self.value or new_id()

    def __repr__(self) -> str:
        return f"<BoxName {self.value}{' promised' if self.promised else ''}>"

    def become(self, value: str) -> None:
        """Take the name of a box that was found."""
        self.promised = self.promised and value == self.value
        self.value = value

    def promise(self) -> None:
        """Let the next box have this name. Where nothing can be written, there is no promise."""
        if self.promised:
            return
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            fresh = self._file.with_suffix(".new")
            fresh.write_text(self.value)
            fresh.replace(self._file)
            self.promised = True

    def redeem(self) -> None:
        """Something may begin from now on.

        Raises:
            OSError: the promise cannot be taken back, so nothing must begin.
        """
        if not self._file.exists():
            self.promised = False
            return
        self._file.unlink()
        folder = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.promised = False

    def renew(self) -> None:
        """Take another name, unless this one is promised."""
        if not self.promised:
            self.value = new_id()

    def forget(self) -> None:
        """Give the promise up: nobody needs it any more."""
        with suppress(OSError):
            self._file.unlink()
        self.promised = False
