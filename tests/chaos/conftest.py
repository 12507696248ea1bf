"""What every test of this folder gets: a case with a place of its own, kept when the test fails."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.chaos import seed
from tests.chaos.checker import Broken, Violation, check
from tests.chaos.history import History, Left, Ran, digest
from tests.chaos.server import Server, final_logs

PLACE = Path(__file__).parent.parent.parent / ".cache" / "chaos"
EFFECTS = "effects"


def pytest_report_header() -> str:
    return f"chaos: SEED={seed.SEED} TIER={seed.TIER}"


class Case:
    """One run: its folder, its randomness, its history."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.history = History(folder)

    @asynccontextmanager
    async def server(self, **options: object) -> AsyncIterator[Server]:
        async with Server(self.folder, **options) as server:
            yield server

    def effect(self, op_id: str, between: str = "") -> str:
        """A command that leaves a trace of its start and its end, so that it shows how often it ran."""
        file = self.folder / EFFECTS
        return f"echo {op_id} start >> {file}; {between}{'; ' if between else ''}echo {op_id} end >> {file}"

    def note_effects(self) -> None:
        """Take the traces of commands into the history."""
        file = self.folder / EFFECTS
        for line in file.read_text().splitlines() if file.exists() else ():
            op_id, what = line.split()
            self.history.add(Ran(op_id=op_id, what=what))

    async def violations(self, server: Server) -> list[Violation]:
        """What the checker says, after the server has ended."""
        for process in server.remains():
            self.history.add(Left(what=f"process {process.pid} {' '.join(process.cmdline())}"))
        violations = check(self.history.records, await final_logs(server.data / "log.db"))
        if violations and server.data != self.folder / "data":
            shutil.copytree(server.data, self.folder / "data")  # where it is goes away with the test
        return violations

    async def judge(self, server: Server) -> None:
        """Fail when a rule was broken."""
        if violations := await self.violations(server):
            raise Broken(violations)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))
    folder = PLACE / f"{name[:40]}-{digest(request.node.name)[:6]}-{seed.SEED}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    failed = request.session.testsfailed
    case = Case(folder, seed.chance(request.node.name))
    yield case
    case.history.close()
    if request.session.testsfailed == failed:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"\nkept: {folder}; judge it again: python -m tests.chaos {folder}; SEED={seed.SEED}")


@pytest.fixture
def tool():
    """Demands a program: without it the test is skipped, or fails where all tools are required."""

    def demand(*names: str) -> None:
        missing = [name for name in names if shutil.which(name) is None]
        if missing:
            sentence = f"not on this machine: {', '.join(missing)}"
            if seed.REQUIRED:
                pytest.fail(sentence)
            pytest.skip(sentence)

    return demand
