"""One number decides everything that is random, and one word how much a run may cost."""

from __future__ import annotations

import os
import random
import secrets

SEED = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**9))
os.environ["CHAOS_SEED"] = str(SEED)  # the workers of this run have the same
TIER = os.environ.get("CHAOS_TIER") or "pr"
REQUIRED = os.environ.get("CHAOS_REQUIRED") == "1"
"""Whether a tool that is missing is a failure instead of a skip."""


def chance(name: str) -> random.Random:
    """The source of everything random in the test of this name."""
    return random.Random(f"{SEED}/{name}")


def times(pr: int, night: int, release: int | None = None) -> int:
    """How often, by tier."""
    return {"pr": pr, "night": night, "release": night if release is None else release}[TIER]


LIMIT = times(600, 2 * 3600, 8 * 3600)
"""Seconds after which a test that hangs fails."""
