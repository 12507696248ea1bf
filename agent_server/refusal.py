"""Why a server does not start, or ends by itself: a sentence for a person, an exit code for whoever started it."""

from __future__ import annotations

BAD_CONFIGURATION = 2
"""An option is wrong (as argparse exits)."""
CANNOT_CREATE = 73
"""The data folder cannot be made or written (EX_CANTCREAT of sysexits.h)."""
DISK_FAILED = 74
"""A running server lost the disk below its log (EX_IOERR)."""
TRY_LATER = 75
"""Somebody else has the port or the data folder (EX_TEMPFAIL)."""


class StartRefused(Exception):
    """The server cannot start. The text is one sentence that says what is wrong and what to do."""

    def __init__(self, sentence: str, *, exit_code: int = BAD_CONFIGURATION) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
