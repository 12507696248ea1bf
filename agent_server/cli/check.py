"""One thing that doctor has looked at."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["ok", "warning", "problem"]


class Check(Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    state: State
    """`warning`: something is missing that not everybody needs; `problem`: a server would not work."""
    found: str
    mend: str = ""
    """What to do; empty when all is well."""
