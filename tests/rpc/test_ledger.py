"""An operation runs once, however often it is asked for."""

import asyncio

import pytest

from agent_sdk.protocol.errors import Cancelled, OpExpired, OpMismatch, PathNotFound, TransferBroken
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.methods.workspace import Execute, FilesMkdir
from agent_sdk.rpc.ledger import FINISHED_BYTES, Ledger
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.pipe import memory_pipes

pytestmark = pytest.mark.timeout(30)


def mkdir(number=1, path="x"):
    return FilesMkdir(op_id=f"018f0000-0000-7000-8000-{number:012x}", path=path)


class Action:
    """Counts how often it runs; waits until it is let go."""

    def __init__(self, result=None, *, waits=False):
        self.runs = 0
        self.result = Done() if result is None else result
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.cancelled = False
        if not waits:
            self.go.set()

    async def __call__(self):
        self.runs += 1
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


async def test_a_repeated_call_gets_the_stored_result():
    ledger, action = Ledger(), Action()
    assert await ledger.run(mkdir(), action) is await ledger.run(mkdir(), action)
    assert action.runs == 1


async def test_a_call_repeated_meanwhile_attaches_to_the_running_one():
    ledger, action = Ledger(), Action(waits=True)
    both = [asyncio.create_task(ledger.run(mkdir(), action)) for _ in range(2)]
    await action.entered.wait()
    action.go.set()
    assert await asyncio.gather(*both) == [Done(), Done()]
    assert action.runs == 1


async def test_the_same_op_id_with_other_params_is_refused():
    ledger, action = Ledger(), Action()
    await ledger.run(mkdir(path="x"), action)
    with pytest.raises(OpMismatch):
        await ledger.run(mkdir(path="y"), action)


async def test_a_repeated_call_may_name_other_channels():
    ledger, action = Ledger(), Action()
    for channel in (1, 3):
        call = Execute(op_id=mkdir().op_id, shell="ls", stdout=channel, stderr=channel + 2)
        await ledger.run(call, action)
    assert action.runs == 1


async def test_another_op_id_is_another_operation():
    ledger, action = Ledger(), Action()
    await ledger.run(mkdir(1), action)
    await ledger.run(mkdir(2), action)
    assert action.runs == 2


async def test_a_failure_is_stored_like_a_result():
    ledger, action = Ledger(), Action(PathNotFound("gone"))
    for _ in range(2):
        with pytest.raises(PathNotFound):
            await ledger.run(mkdir(), action)
    assert action.runs == 1


async def test_a_failure_that_may_pass_is_not_stored():
    ledger, action = Ledger(), Action(TransferBroken("once more"))
    for _ in range(2):
        with pytest.raises(TransferBroken):
            await ledger.run(mkdir(), action)
    assert action.runs == 2


async def test_the_last_who_cancels_ends_the_operation():
    ledger, action = Ledger(), Action(waits=True)
    first, second = (asyncio.create_task(ledger.run(mkdir(), action)) for _ in range(2))
    await action.entered.wait()
    first.cancel()
    await asyncio.wait({first})
    assert not action.cancelled
    second.cancel()
    await asyncio.wait({second})
    assert action.cancelled
    assert (first.cancelled(), second.cancelled()) == (True, True)


async def test_a_cancelled_operation_may_run_again():
    ledger, action = Ledger(), Action(waits=True)
    calling = asyncio.create_task(ledger.run(mkdir(), action))
    await action.entered.wait()
    calling.cancel()
    await asyncio.wait({calling})
    action.go.set()
    assert await ledger.run(mkdir(), action) == Done()
    assert action.runs == 2


async def test_an_operation_whose_callers_lost_their_connection_goes_on():
    ledger, action = Ledger(), Action(waits=True)
    async with Peer(memory_pipes()[0], opener=False) as peer:
        calling = asyncio.create_task(ledger.run(mkdir(), action, Inbound(peer, 1)))
        await action.entered.wait()
    calling.cancel()
    await asyncio.wait({calling})
    again = asyncio.create_task(ledger.run(mkdir(), action))
    action.go.set()
    assert await again == Done()
    assert (action.runs, action.cancelled) == (1, False)


async def test_who_attaches_to_an_operation_that_is_being_cancelled_hears_of_it():
    ledger, action = Ledger(), Action(waits=True)
    calling = asyncio.create_task(ledger.run(mkdir(), action))
    await action.entered.wait()
    late = asyncio.create_task(late_caller(ledger, action, calling))
    with pytest.raises(Cancelled):
        await late


async def late_caller(ledger, action, first):
    first.cancel()
    await asyncio.sleep(0)
    return await ledger.run(mkdir(), action)


async def test_the_oldest_results_are_forgotten_and_their_operations_never_run_again():
    ledger, action = Ledger(finished=2, seconds=0), Action()
    for number in (1, 2, 3):
        await ledger.run(mkdir(number), action)
    assert [await ledger.run(mkdir(number), action) for number in (2, 3)] == [Done(), Done()]
    with pytest.raises(OpExpired, match="not run again") as refused:
        await ledger.run(mkdir(1), action)
    assert refused.value.details == {"op_id": mkdir(1).op_id}
    assert action.runs == 3


async def test_results_of_a_day_are_kept_although_there_are_many():
    ledger, action = Ledger(finished=2, seconds=3600), Action()
    for number in (1, 2, 3, 1):
        await ledger.run(mkdir(number), action)
    assert action.runs == 3


async def test_heavy_results_lose_their_output_and_nothing_else():
    ledger = Ledger(weigh=lambda _: FINISHED_BYTES // 2 + 1, strip=lambda result: f"{result} without output")
    for number in (1, 2):
        await ledger.run(mkdir(number), Action(str(number)))
    again = [await ledger.run(mkdir(number), Action("another")) for number in (1, 2)]
    assert again == ["1 without output", "2"]


async def test_a_ledger_knows_what_runs_what_ended_and_what_is_forgotten():
    ledger, action = Ledger(finished=1, seconds=0), Action(waits=True)
    running = asyncio.create_task(ledger.run(mkdir(1), action))
    await action.entered.wait()
    assert (mkdir(1).op_id in ledger, ledger.is_running(mkdir(1).op_id)) == (True, True)
    action.go.set()
    await running
    await ledger.run(mkdir(2), Action())
    assert (mkdir(1).op_id in ledger, ledger.is_running(mkdir(1).op_id)) == (True, False)
    assert mkdir(3).op_id not in ledger


async def test_closing_ends_what_still_runs():
    ledger, action = Ledger(), Action(waits=True)
    calling = asyncio.create_task(ledger.run(mkdir(), action))
    await action.entered.wait()
    await ledger.close()
    assert action.cancelled
    with pytest.raises(Cancelled):
        await calling
    await ledger.close()
