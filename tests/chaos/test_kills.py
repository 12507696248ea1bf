"""The server is killed: at random moments, and right before it commits."""

from __future__ import annotations

import asyncio
import shutil
import signal

import pytest

from tests.chaos import seed
from tests.chaos.checker import Violation, broken_rules
from tests.chaos.conftest import Case
from tests.chaos.history import Called
from tests.chaos.storm import traffic
from tests.chaos.syscalls import attached, inject

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

COMMIT, WRITE = "fsync,fdatasync", "pwrite64"


async def storm(case: Case, kills: int, mutant: str = "") -> list[Violation]:
    """Kill the server at random moments; what the checker says."""
    async with case.server(mutant=mutant, box_linger_seconds=5) as server:
        assert await server.start()
        async with traffic(server, case.history) as clients:
            for _ in range(kills):
                await case.history.more(case.chance.randrange(1, 9))
                await asyncio.sleep(case.chance.uniform(0, 0.05))  # the moment is the fault
                await server.restart()
            await clients.finish()
        await server.stop()
        return await case.violations(server)


async def test_nothing_is_lost_or_doubled_when_the_server_is_killed_at_random_moments(case):
    violations = await storm(case, seed.times(60, 1000, 10_000))
    assert not violations
    answered = [record for record in case.history.records if isinstance(record, Called)]
    print(f"{len(answered)} calls, {sum(call.tries > 1 for call in answered)} repeated")
    assert sum(call.outcome == "ok" for call in answered) > 150
    assert any(call.tries > 1 for call in answered)


async def test_the_storm_finds_a_build_that_replays_from_the_wrong_place(case):
    assert 3 in broken_rules(await storm(case, 4, "no_resume_mark"))


async def boundaries(case: Case, calls: str, kills: int, mutant: str = "") -> list[Violation]:
    """Kill the server at its first, second, … system call of a kind; what the checker says."""
    async with case.server(mutant=mutant, box_linger_seconds=5) as server:
        assert await server.start()
        async with traffic(server, case.history) as clients:
            for nth in range(1, kills + 1):
                async with attached(server, calls, f"signal=SIGKILL:when={nth}"):
                    assert await server.ended() == -signal.SIGKILL
                assert await server.start()
            await clients.finish()
        await server.stop()
        return await case.violations(server)


@pytest.mark.parametrize(("calls", "kills"), [(COMMIT, (20, 300)), (WRITE, (10, 300))])
async def test_nothing_is_lost_or_doubled_when_the_server_dies_right_before_a_commit(
    case, tool, calls, kills
):
    tool("strace")
    assert not await boundaries(case, calls, seed.times(*kills))


async def test_deaths_before_a_commit_find_a_build_that_answers_too_early(case, tool):
    tool("strace")
    assert broken_rules(await boundaries(case, WRITE, 6, "early_ack")) & {1, 3}


async def test_a_server_that_dies_at_the_first_commits_of_its_life_starts_the_next_time(case, tool):
    tool("strace")
    async with case.server() as server:
        for nth in range(1, 5):
            await server.start(*inject(COMMIT, f"signal=SIGKILL:when={nth}"))
            await server.kill()
            assert await server.start()
            assert await server.stop() == 0
            shutil.rmtree(server.data)
