"""The power fails: what was acknowledged is on the device, and a damaged build shows that this test would tell."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import seed
from tests.chaos.checker import Violation, broken_rules, check
from tests.chaos.conftest import Case
from tests.chaos.disk import Image
from tests.chaos.server import Server, final_logs
from tests.chaos.storm import traffic

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(seed.LIMIT),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """Where file systems are mounted and their images are."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


async def lose_power(case: Case, place: Path, mutant: str = "") -> list[Violation]:
    """Write for a while, lose the power, start again on what the device has; what the checker says of the moment."""
    image = Image(place / "disk.img")
    await image.make()
    async with (
        image.mounted(place / "disk") as disk,
        case.server(data=disk / "data", mutant=mutant) as server,
    ):
        assert await server.start()
        async with traffic(server, case.history):
            await case.history.more(case.chance.randrange(20, 60))
            server.signal(signal.SIGSTOP)
            known = list(case.history.records)
            left = await image.after_power_loss(place / "left.img")
            server.signal(signal.SIGCONT)
            return [v for v in check(known, await surviving(left, place, case)) if v.rule != 2]


async def surviving(left: Image, place: Path, case: Case):
    """What a new server finds on the device, once it has looked at it."""
    async with left.mounted(place / "left") as disk:
        async with Server(case.folder, data=disk / "data") as server:
            assert await server.start(), "the server does not start on what a power loss left"
            assert await server.stop() == 0
        return await final_logs(disk / "data" / "log.db")


@pytest.mark.parametrize("round", range(seed.times(5, 200, 1000)))
async def test_a_power_loss_takes_nothing_that_was_acknowledged(case, place, tool, round):
    tool("mkfs.ext4", "mount")
    assert not await lose_power(case, place)


async def test_a_power_loss_finds_a_build_that_does_not_wait_for_the_disk(case, place, tool):
    tool("mkfs.ext4", "mount")
    assert broken_rules(await lose_power(case, place, "no_fsync")) & {1, 3}
