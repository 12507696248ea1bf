"""Workspaces with a limit, for the tests that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

from workspaces.disks import Disks


async def limited(folder: Path) -> Disks:
    """Disks below a folder; skips the test where this machine cannot mount them."""
    disks = Disks(folder)
    await disks.prepare()
    if disks.mechanism == "none":
        pytest.skip(f"this machine cannot limit a workspace: {disks.why}")
    return disks


async def unlimited(folder: Path) -> Disks:
    """Plain folders."""
    disks = Disks(folder, quota=False)
    await disks.prepare()
    return disks
