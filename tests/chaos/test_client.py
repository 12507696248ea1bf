"""The product's own client: whatever happens to its connection, its callbacks tell the same story."""

from __future__ import annotations

import asyncio

import pytest

from agent_sdk import Agent, Conversation, RemoteWorkspace
from agent_sdk.testing import ScriptedLLM, say
from tests.chaos import seed
from tests.chaos.proxy import Proxy
from tests.chaos.server import KEY
from tests.chaos.storm import talked

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(seed.LIMIT)]

STEP = seed.times(97, 1)
"""Bytes between two cuts."""
FIRST_TRY_SECONDS = 60.0


async def transcript(port: int, id: str, head: int) -> list[object]:
    """What the callbacks of a client see of a conversation, from its first event to that one."""
    seen: list[object] = []
    all_seen = asyncio.Event()

    def see(event) -> None:
        seen.append(event)
        if event.seq >= head:
            all_seen.set()

    url = f"http://127.0.0.1:{port}"
    async with (
        RemoteWorkspace(url, KEY, conversation=id, connect_timeout=FIRST_TRY_SECONDS) as workspace,
        Conversation(None, workspace, since=0, callbacks=[see]),
    ):
        async with asyncio.timeout(60):
            await all_seen.wait()
    return seen


async def test_the_callbacks_of_a_session_cut_at_any_byte_see_the_same(case):
    async with case.server() as server:
        assert await server.start()
        id, head = await talked(server, case.history, 12, "x" * 500)
        async with Proxy(server) as proxy:
            whole = await transcript(proxy.port, id, head)
            assert [event.seq for event in whole] == list(range(1, head + 1))
            for cut in range(1, proxy.passed["down"], STEP):
                proxy.cuts = [("down", cut)]
                assert await transcript(proxy.port, id, head) == whole, f"cut after {cut} bytes"
        await server.stop()


async def test_a_client_works_on_through_kills_of_the_server(case):
    rounds = seed.times(6, 100)
    seen: list[int] = []
    agent = Agent(llm=ScriptedLLM([say("ok")], repeat=True))
    async with case.server() as server:
        assert await server.start()
        async with (
            RemoteWorkspace(f"http://127.0.0.1:{server.port}", KEY) as workspace,
            Conversation(agent, workspace, callbacks=[lambda event: seen.append(event.seq)]) as conversation,
        ):
            await workspace.execute("true")  # a command that meets a box in its start may be told `unknown`
            for nth in range(rounds):
                sending = asyncio.create_task(conversation.send_message(f"message {nth}"))
                running = asyncio.create_task(
                    workspace.execute(f"echo {nth} >> {case.folder}/runs; echo {nth}")
                )
                await asyncio.sleep(case.chance.uniform(0, 0.05))  # the moment is the fault
                await server.restart()
                await sending
                result = await running
                assert result.stdout == f"{nth}\n", result
                assert (await conversation.run()).status == "finished"
            head = (await conversation.state()).head_seq
            events = [event async for event in conversation.events()]
        assert seen == list(range(seen[0], head + 1))
        texts = [event.text for event in events if event.__class__.__name__ == "UserMessage"]
        assert texts == [f"message {nth}" for nth in range(rounds)]
        assert (case.folder / "runs").read_text() == "".join(f"{nth}\n" for nth in range(rounds))
        await server.stop()
