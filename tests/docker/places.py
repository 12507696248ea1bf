"""Workspaces with a limit, for the tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workspaces.backend.disks import Disks


async def limited(folder: Path) -> Disks:
    """Disks below a folder. Where this machine cannot mount them the test is skipped, as if there were no engine."""
    disks = Disks(folder)
    await disks.prepare()
    if disks.mechanism == "none":
        give_up = pytest.fail if os.environ.get("CONTAINERS_REQUIRED") else pytest.skip
        give_up(f"this machine cannot limit a workspace: {disks.why}")
    return disks


async def unlimited(folder: Path) -> Disks:
    """Plain folders."""
    disks = Disks(folder, quota=False)
    await disks.prepare()
    return disks
