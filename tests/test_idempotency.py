"""An operation runs once, however often it is asked for."""

import asyncio

import pytest

from agent_sdk.idempotency import KEPT_BYTES, Answer, Asked, IdempotencyStore, InMemory
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import (
    Cancelled,
    OpExpired,
    OpMismatch,
    OutcomeUnknown,
    PathNotFound,
    TransferBroken,
)
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.methods.workspace import Execute, FilesMkdir
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
    store, action = IdempotencyStore(InMemory()), Action()
    assert await store.run(mkdir(), action) is await store.run(mkdir(), action)
    assert action.runs == 1


async def test_a_call_repeated_meanwhile_attaches_to_the_running_one():
    store, action = IdempotencyStore(InMemory()), Action(waits=True)
    both = [asyncio.create_task(store.run(mkdir(), action)) for _ in range(2)]
    await action.entered.wait()
    action.go.set()
    assert await asyncio.gather(*both) == [Done(), Done()]
    assert action.runs == 1


async def test_the_same_op_id_with_other_params_is_refused():
    store, action = IdempotencyStore(InMemory()), Action()
    await store.run(mkdir(path="x"), action)
    with pytest.raises(OpMismatch):
        await store.run(mkdir(path="y"), action)


async def test_a_repeated_call_may_name_other_channels():
    store, action = IdempotencyStore(InMemory()), Action()
    for channel in (1, 3):
        call = Execute(op_id=mkdir().op_id, shell="ls", stdout=channel, stderr=channel + 2)
        await store.run(call, action)
    assert action.runs == 1


async def test_another_op_id_is_another_operation():
    store, action = IdempotencyStore(InMemory()), Action()
    await store.run(mkdir(1), action)
    await store.run(mkdir(2), action)
    assert action.runs == 2


async def test_a_failure_is_stored_like_a_result():
    store, action = IdempotencyStore(InMemory()), Action(PathNotFound("gone"))
    for _ in range(2):
        with pytest.raises(PathNotFound):
            await store.run(mkdir(), action)
    assert action.runs == 1


async def test_a_failure_that_may_pass_is_not_stored():
    store, action = IdempotencyStore(InMemory()), Action(TransferBroken("once more"))
    for _ in range(2):
        with pytest.raises(TransferBroken):
            await store.run(mkdir(), action)
    assert action.runs == 2


async def test_the_last_who_cancels_ends_the_operation():
    store, action = IdempotencyStore(InMemory()), Action(waits=True)
    first, second = (asyncio.create_task(store.run(mkdir(), action)) for _ in range(2))
    await action.entered.wait()
    first.cancel()
    await asyncio.wait({first})
    assert not action.cancelled
    second.cancel()
    await asyncio.wait({second})
    assert action.cancelled
    assert (first.cancelled(), second.cancelled()) == (True, True)


async def test_a_cancelled_operation_may_run_again():
    store, action = IdempotencyStore(InMemory()), Action(waits=True)
    calling = asyncio.create_task(store.run(mkdir(), action))
    await action.entered.wait()
    calling.cancel()
    await asyncio.wait({calling})
    action.go.set()
    assert await store.run(mkdir(), action) == Done()
    assert action.runs == 2


async def test_an_operation_that_is_cancelled_before_it_has_taken_a_step_may_run_again():
    store, action = IdempotencyStore(InMemory()), Action()
    calling = asyncio.create_task(store.run(mkdir(), action))
    await asyncio.sleep(0)  # the caller's step; the next one is that of the operation
    assert store.is_running(mkdir().op_id)
    await store.close()
    await asyncio.wait({calling})
    assert (action.runs, mkdir().op_id in store) == (0, False)
    assert await store.run(mkdir(), action) == Done()


async def test_an_operation_whose_callers_lost_their_connection_goes_on():
    store, action = IdempotencyStore(InMemory()), Action(waits=True)
    async with Peer(memory_pipes()[0], opener=False) as peer:
        calling = asyncio.create_task(store.run(mkdir(), action, Inbound(peer, 1)))
        await action.entered.wait()
    calling.cancel()
    await asyncio.wait({calling})
    again = asyncio.create_task(store.run(mkdir(), action))
    action.go.set()
    assert await again == Done()
    assert (action.runs, action.cancelled) == (1, False)


async def test_who_attaches_to_an_operation_that_is_being_cancelled_hears_of_it():
    store, action = IdempotencyStore(InMemory()), Action(waits=True)
    calling = asyncio.create_task(store.run(mkdir(), action))
    await action.entered.wait()
    late = asyncio.create_task(late_caller(store, action, calling))
    with pytest.raises(Cancelled):
        await late


async def late_caller(store, action, first):
    first.cancel()
    await asyncio.sleep(0)
    return await store.run(mkdir(), action)


async def test_the_oldest_results_are_forgotten_and_their_operations_never_run_again():
    store, action = IdempotencyStore(InMemory(kept=2, seconds=0)), Action()
    for number in (1, 2, 3):
        await store.run(mkdir(number), action)
    assert [await store.run(mkdir(number), action) for number in (2, 3)] == [Done(), Done()]
    with pytest.raises(OpExpired, match="not run again") as refused:
        await store.run(mkdir(1), action)
    assert refused.value.details == {"op_id": mkdir(1).op_id}
    assert action.runs == 3


async def test_results_of_a_day_are_kept_although_there_are_many():
    store, action = IdempotencyStore(InMemory(kept=2, seconds=3600)), Action()
    for number in (1, 2, 3, 1):
        await store.run(mkdir(number), action)
    assert action.runs == 3


async def test_heavy_results_lose_their_output_and_nothing_else():
    store = IdempotencyStore(
        InMemory(weigh=lambda _: KEPT_BYTES // 2 + 1, strip=lambda result: f"{result} without output")
    )
    for number in (1, 2):
        await store.run(mkdir(number), Action(str(number)))
    again = [await store.run(mkdir(number), Action("another")) for number in (1, 2)]
    assert again == ["1 without output", "2"]


async def test_a_store_knows_what_runs_what_ended_and_what_is_forgotten():
    store, action = IdempotencyStore(InMemory(kept=1, seconds=0)), Action(waits=True)
    running = asyncio.create_task(store.run(mkdir(1), action))
    await action.entered.wait()
    assert (mkdir(1).op_id in store, store.is_running(mkdir(1).op_id)) == (True, True)
    action.go.set()
    await running
    await store.run(mkdir(2), Action())
    assert (mkdir(1).op_id in store, store.is_running(mkdir(1).op_id)) == (True, False)
    assert mkdir(3).op_id not in store


async def test_closing_ends_what_still_runs():
    store, action = IdempotencyStore(InMemory()), Action(waits=True)
    calling = asyncio.create_task(store.run(mkdir(), action))
    await action.entered.wait()
    await store.close()
    assert action.cancelled
    with pytest.raises(Cancelled):
        await calling
    await store.close()


async def test_a_call_that_has_begun_and_that_nobody_runs_is_unknown_and_not_run():
    kept, action, another = InMemory(), Action(waits=True), Action()
    running = asyncio.create_task(IdempotencyStore(kept).run(mkdir(), action))
    await action.entered.wait()
    with pytest.raises(OutcomeUnknown):
        await IdempotencyStore(kept).run(mkdir(), another)
    action.go.set()
    assert await running == await IdempotencyStore(kept).run(mkdir(), another) == Done()
    assert another.runs == 0


# --- what every back end keeps to ---


@pytest.fixture(params=["memory", "log"])
async def kept(request, tmp_path):
    """Where calls are remembered, and two answers of the kind that it keeps."""
    if request.param == "memory":
        yield InMemory(), Answer("first"), Answer("second")
        return
    async with EventLog.open(tmp_path / "log.db") as log:
        await log.create("c")
        yield log.operations("c"), b"first", b"second"


CALL = Asked("op", b"digest", "execute", "box")


async def test_a_call_is_new_once_and_then_has_begun(kept):
    back_end, *_ = kept
    assert await back_end.begin(CALL) is None
    known = await back_end.begin(CALL)
    assert (known.op_id, known.answer) == ("op", None)


async def test_the_first_answer_of_a_call_is_what_is_known_of_it(kept):
    back_end, first, second = kept
    await back_end.begin(CALL)
    for answer in (first, second):
        await back_end.finish("op", answer)
    assert (await back_end.begin(CALL)).answer == first


async def test_a_call_with_another_digest_is_refused_whether_it_has_begun_or_finished(kept):
    back_end, answer, _ = kept
    await back_end.begin(CALL)
    with pytest.raises(OpMismatch):
        await back_end.begin(CALL._replace(digest=b"other"))
    await back_end.finish("op", answer)
    with pytest.raises(OpMismatch):
        await back_end.begin(CALL._replace(digest=b"other"))


async def test_a_call_that_was_withdrawn_is_new_and_one_that_has_finished_cannot_be(kept):
    back_end, answer, _ = kept
    await back_end.begin(CALL)
    await back_end.withdraw("op")
    assert await back_end.begin(CALL._replace(digest=b"other")) is None
    await back_end.finish("op", answer)
    await back_end.withdraw("op")
    assert (await back_end.begin(CALL._replace(digest=b"other"))).answer == answer


async def test_an_answer_to_what_never_began_is_not_kept(kept):
    back_end, answer, _ = kept
    await back_end.finish("op", answer)
    assert await back_end.begin(CALL) is None
