"""Calls come more than once: on the same connection, on new and parallel ones, before and after a kill."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from agent_sdk.ids import new_id
from tests.chaos import seed
from tests.chaos.checker import Violation, broken_rules
from tests.chaos.client import Session, Writer
from tests.chaos.conftest import Case
from tests.chaos.history import Left
from tests.chaos.server import Server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]


async def repeat(case: Case, kinds: Sequence[str], mutant: str = "") -> list[Violation]:
    """Send every call up to three more times; what the checker says of what they did."""
    async with case.server(mutant=mutant) as server:
        assert await server.start()
        async with Session.open(server.port) as session:
            id = session.introduction["conversation"]
        async with Writer("writer", server, id, case.history) as writer:
            for nth in range(seed.times(40, 2000)):
                await once_and_again(case, server, writer, case.chance.choice(kinds), nth)
        case.note_effects()
        await server.stop()
        return await case.violations(server)


async def once_and_again(case: Case, server: Server, writer: Writer, method: str, nth: int) -> None:
    """One call, its answer, and its repetitions, which get the same answer."""
    op_id = new_id()
    params = {"text": f"message {nth}"} if method == "send_message" else {"shell": case.effect(op_id)}
    first = await writer.effect(method, op_id=op_id, **params)
    if nth % 10 == 9:
        await server.kill()
        for box in server.boxes():
            box.kill()
        assert await server.start()
    answers = await asyncio.gather(
        *(again(case, writer, server, method, op_id, params) for _ in range(case.chance.randrange(1, 4)))
    )
    told = {"seq", "run_id", "status", "exit_code"}
    for answer in answers:
        if {key: answer.get(key) for key in told} != {key: first.get(key) for key in told}:
            case.history.add(Left(what=f"another answer to {method} {op_id}: {answer} after {first}"))


async def again(case: Case, writer: Writer, server: Server, method: str, op_id: str, params) -> dict:
    """The answer to a repetition, on the same connection or on one of its own."""
    if case.chance.random() < 0.5:
        return await writer.ask(method, op_id=op_id, **params)
    async with Session.open(server.port, writer.conversation) as session:
        return await session.call(method, op_id=op_id, **params)


@pytest.mark.parametrize("kind", ["send_message", "execute"])
async def test_a_call_that_comes_again_is_not_made_again(case, kind):
    assert not await repeat(case, [kind])


@pytest.mark.parametrize(("kind", "rule"), [("send_message", 1), ("execute", 6)])
async def test_repetitions_find_a_build_that_remembers_nothing(case, kind, rule):
    assert rule in broken_rules(await repeat(case, [kind], "no_dedupe"))
