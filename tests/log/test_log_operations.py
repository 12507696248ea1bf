"""What the log remembers of calls that change something: begun, finished, expired, never run twice."""

import apsw
import pytest

from agent_sdk.idempotency import Asked
from agent_sdk.log.event_log import EventLog, Operation
from agent_sdk.log.operations import KEPT, KEPT_SECONDS
from agent_sdk.protocol.errors import ConversationNotFound, OpExpired, OpMismatch, OutcomeUnknown
from agent_sdk.protocol.events import UserMessage


@pytest.fixture(params=["file", "memory"])
async def log(request, tmp_path):
    async with EventLog.open(tmp_path / "log.db" if request.param == "file" else None) as log:
        await log.create("c")
        yield log


@pytest.fixture
def file(tmp_path):
    return tmp_path / "log.db"


async def begin(log: EventLog, op_id: str, digest: bytes = b"digest"):
    return await log.operations("c").begin(Asked(op_id, digest, "execute", "box-1"))


async def test_what_is_begun_for_the_first_time_was_not_known(log):
    assert await begin(log, "op") is None
    [known] = await log.operations("c").begun()
    assert (known.op_id, known.method, known.instance, known.answer) == ("op", "execute", "box-1", None)
    assert known.at > 0


async def test_what_has_begun_is_known_without_a_result_until_it_is_finished(log):
    await begin(log, "op")
    assert (await begin(log, "op")).answer is None
    await log.operations("c").finish("op", b"answer")
    assert (await begin(log, "op")).answer == b"answer"
    assert await log.operations("c").begun() == []


async def test_what_was_begun_in_vain_is_forgotten_but_not_what_has_finished(log):
    await begin(log, "op")
    await log.operations("c").withdraw("op")
    assert await log.operations("c").begun() == []
    assert await begin(log, "op", b"other digest") is None
    await log.operations("c").finish("op", b"answer")
    await log.operations("c").withdraw("op")
    assert (await begin(log, "op", b"other digest")).answer == b"answer"


async def test_an_empty_answer_is_an_answer(log):
    await begin(log, "op")
    await log.operations("c").finish("op", b"")
    assert (await begin(log, "op")).answer == b""


async def test_the_first_answer_of_an_operation_stays(log):
    await begin(log, "op")
    await log.operations("c").finish("op", b"first")
    await log.operations("c").finish("op", b"second")
    assert (await begin(log, "op")).answer == b"first"


async def test_finishing_what_was_never_begun_writes_nothing(log):
    await log.operations("c").finish("op", b"answer")
    assert await begin(log, "op") is None


async def test_a_begun_operation_with_other_params_is_refused(log):
    await begin(log, "op")
    with pytest.raises(OpMismatch):
        await begin(log, "op", b"other")
    with pytest.raises(OpMismatch):
        await log.append("c", [UserMessage(text="a")], op=Operation("op", b"other", b""))


async def test_operations_belong_to_their_conversation(log):
    await log.create("d")
    await begin(log, "op")
    assert await log.operations("d").begun() == []
    assert await log.operations("d").begin(Asked("op", b"other")) is None
    with pytest.raises(ConversationNotFound):
        await log.operations("x").begun()


async def test_what_has_begun_and_what_has_finished_survives_a_restart(file):
    async with EventLog.open(file) as log:
        await log.create("c")
        await begin(log, "open")
        await begin(log, "done")
        await log.operations("c").finish("done", b"answer")
    async with EventLog.open(file) as log:
        assert [known.op_id for known in await log.operations("c").begun()] == ["open"]
        assert (await begin(log, "done")).answer == b"answer"


async def fill(log: EventLog, count: int) -> None:
    """Operations that finished one after the other."""
    for number in range(count):
        await log.append("c", [], op=Operation(f"op-{number}", b"digest", b"answer"))


def change(file, statement: str) -> None:
    connection = apsw.Connection(str(file))
    connection.execute(statement)
    connection.close()


async def test_what_is_old_expires_when_there_are_ten_thousand_newer_ones_and_is_never_run_again(file):
    """The clock of the log is put forward in the file, as a day of being open would."""
    async with EventLog.open(file) as log:
        await log.create("c")
        await fill(log, 3)
        await begin(log, "still running")
    change(file, f"UPDATE clock SET seconds = {KEPT_SECONDS + 1}")
    async with EventLog.open(file) as log:
        await log.append("c", [], op=Operation("op", b"digest", b"answer"))
        assert (await log.operations("c").find(Asked("op-0"))).answer == b"answer"
    change(file, f"UPDATE operations SET nth = nth + {KEPT} WHERE op_id = 'op'")
    async with EventLog.open(file) as log:
        await log.append("c", [], op=Operation("next", b"digest", b"answer"))
        for call in (
            begin(log, "op-0"),
            log.operations("c").find(Asked("op-0")),
            log.append("c", [UserMessage(text="a")], op=Operation("op-1", b"digest", b"")),
        ):
            with pytest.raises(OpExpired):
                await call
        assert [known.op_id for known in await log.operations("c").begun()] == ["still running"]
        assert (await log.operations("c").find(Asked("op-2"))).answer == b"answer"
        assert await log.head("c") == 0


async def test_what_is_young_stays_however_many_come_after_it(file):
    async with EventLog.open(file) as log:
        await log.create("c")
        await fill(log, 2)
    change(file, f"UPDATE operations SET nth = nth + {KEPT} WHERE op_id = 'op-1'")
    async with EventLog.open(file) as log:
        await log.append("c", [], op=Operation("next", b"digest", b"answer"))
        assert (await log.operations("c").find(Asked("op-0"))).answer == b"answer"


async def test_what_has_begun_is_listed_but_not_a_row_that_is_damaged(file):
    async with EventLog.open(file) as log:
        await log.create("c")
        await begin(log, "one")
        await begin(log, "two")
    change(file, "UPDATE operations SET method = 'upload' WHERE op_id = 'one'")
    async with EventLog.open(file) as log:
        assert [known.op_id for known in await log.operations("c").begun()] == ["two"]
        with pytest.raises(OutcomeUnknown):
            await begin(log, "one")


async def test_an_operation_whose_row_is_damaged_has_an_unknown_outcome(file):
    async with EventLog.open(file) as log:
        await log.create("c")
        await fill(log, 1)
    change(file, "UPDATE operations SET result = CAST('bnswer' AS BLOB)")
    async with EventLog.open(file) as log:
        with pytest.raises(OutcomeUnknown):
            await log.operations("c").find(Asked("op-0"))


async def test_settings_are_kept_beside_the_events_and_go_with_the_conversation(log):
    assert await log.settings("c") is None
    await log.store_settings("c", b'{"model":"m"}', None)
    await log.store_settings("c", b'{"model":"n"}', b"sealed")
    assert await log.settings("c") == (b'{"model":"n"}', b"sealed")
    await log.delete("c")
    await log.create("c")
    assert await log.settings("c") is None
