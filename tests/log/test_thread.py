"""The thread that owns a database: whose job is done when."""

import asyncio
import threading

import pytest

from agent_sdk.log.database import Database
from agent_sdk.log.thread import JOBS_PER_COMMIT, DatabaseThread


@pytest.fixture
async def thread():
    async with DatabaseThread(lambda: Database(None), name="thread-under-test") as thread:
        yield thread


async def test_a_lane_that_is_flooded_delays_another_by_at_most_one_commit(thread):
    gate, done = threading.Event(), []
    thread.submit(lambda database: gate.wait(), writes=True)
    flood = [
        thread.submit(lambda database: done.append("flood"), lane="a", writes=True) for _ in range(10_000)
    ]
    other = thread.submit(lambda database: done.append("other"), lane="b", writes=True)
    gate.set()
    await asyncio.gather(other, *flood)
    assert done.index("other") <= JOBS_PER_COMMIT
    assert len(done) == 10_001


async def test_the_jobs_of_a_lane_keep_their_order(thread):
    done = []
    futures = [
        thread.submit(lambda database, nth=nth: done.append(nth), lane=f"{nth % 3}", writes=True)
        for nth in range(3000)
    ]
    await asyncio.gather(*futures)
    for lane in range(3):
        assert [nth for nth in done if nth % 3 == lane] == list(range(lane, 3000, 3))
