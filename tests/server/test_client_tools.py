"""Tools of clients: who is asked, and what happens when the one who was asked goes away."""

from __future__ import annotations

import asyncio

import pytest

from agent_sdk.agent.turn_state import PRESENT, Course, Stage
from agent_sdk.protocol.errors import InternalError
from agent_sdk.protocol.events import RequestOpened
from agent_sdk.protocol.methods.connection import Ping
from agent_sdk.protocol.methods.conversation import ToolCall, ToolOutput
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_server.conversations.loaded import ClientTools
from tests.server.wire import GUARD

REQUEST = RequestOpened(
    request_id="r1", call_id="c1", request="client_tool", tool="price", arguments='{"of":"x"}'
)


class Client:
    """A client at the other end of a connection: it answers, or hangs until told."""

    def __init__(self, answer: str | None = None, error: Exception | None = None):
        self.asked: list[ToolCall] = []
        self.was_asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._answer = answer
        self._error = error
        if answer is not None or error is not None:
            self.may_answer.set()

    async def call_tool(self, params, call):
        self.asked.append(params)
        self.was_asked.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self._error is not None:
            raise self._error
        return ToolOutput(text=self._answer or "late", data={"n": 1})


@pytest.fixture
async def connect():
    """Connect a client; returns the server's end of it."""
    async with asyncio.timeout(GUARD), asyncio.TaskGroup() as tasks:
        opened: list[Peer] = []

        async def connected(client: Client) -> Peer:
            here, there = memory_pipes()
            ready = asyncio.get_running_loop().create_future()

            async def live() -> None:
                async with (
                    Peer(there, {ToolCall: client.call_tool}, opener=True),
                    Peer(here, opener=False) as server_end,
                ):
                    ready.set_result(server_end)
                    await server_end.wait_closed()

            tasks.create_task(live())
            opened.append(await ready)
            return opened[-1]

        yield connected
        for peer in opened:
            await peer.close()


async def test_the_connection_that_registered_a_tool_runs_it(connect):
    tools, client = ClientTools(), Client("5 EUR")
    tools.register(await connect(client), ["price"])
    result = await tools.run(REQUEST)
    assert (result.text, result.data, result.is_error) == ("5 EUR", {"n": 1}, False)
    assert (client.asked[0].request_id, client.asked[0].arguments) == ("r1", '{"of":"x"}')


async def test_the_newest_connection_is_asked(connect):
    tools, old, new = ClientTools(), Client("old"), Client("new")
    tools.register(await connect(old), ["price"])
    tools.register(await connect(new), ["price", "other"])
    assert (await tools.run(REQUEST)).text == "new"
    assert old.asked == []


async def test_without_a_connection_the_call_waits_for_one(connect):
    tools, other, client = ClientTools(), Client("no"), Client("here now")
    tools.register(await connect(other), ["something_else"])
    waiting = asyncio.create_task(tools.run(REQUEST))
    await asyncio.sleep(0)
    tools.register(await connect(client), ["price"])
    assert (await waiting).text == "here now"
    assert other.asked == []


async def test_a_connection_that_dies_in_the_middle_makes_the_call_wait_again(connect):
    tools, dying, client = ClientTools(), Client(), Client("second try")
    peer = await connect(dying)
    tools.register(peer, ["price"])
    waiting = asyncio.create_task(tools.run(REQUEST))
    await dying.was_asked.wait()
    await peer.close()
    assert not waiting.done()
    tools.register(await connect(client), ["price"])
    assert (await waiting).text == "second try"


async def test_an_older_connection_takes_over_when_the_newest_dies(connect):
    tools, old, new = ClientTools(), Client("old one"), Client()
    peer = await connect(new)
    tools.register(await connect(old), ["price"])
    tools.register(peer, ["price"])
    waiting = asyncio.create_task(tools.run(REQUEST))
    await new.was_asked.wait()
    await peer.close()
    assert (await waiting).text == "old one"


async def test_the_first_answer_counts_and_the_other_call_is_withdrawn(connect):
    tools, slow, quick = ClientTools(), Client(), Client("quick")
    tools.register(await connect(slow), ["price"])
    waiting = asyncio.create_task(tools.run(REQUEST))
    await slow.was_asked.wait()
    tools.register(await connect(quick), ["price"])
    assert (await waiting).text == "quick"
    await slow.cancelled.wait()


async def test_what_the_clients_code_raises_is_an_error_result(connect):
    tools, client = ClientTools(), Client(error=InternalError("it broke"))
    tools.register(await connect(client), ["price"])
    result = await tools.run(REQUEST)
    assert (result.is_error, result.text) == (True, "price: it broke")


async def test_cancelling_withdraws_the_call(connect):
    tools, client = ClientTools(), Client()
    tools.register(await connect(client), ["price"])
    waiting = asyncio.create_task(tools.run(REQUEST))
    await client.was_asked.wait()
    waiting.cancel()
    await client.cancelled.wait()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_call_that_the_server_leaves_to_the_next_one_goes_on_in_the_client(connect):
    tools, client, course = ClientTools(), Client(), Course()
    PRESENT.set(course)
    peer = await connect(client)
    tools.register(peer, ["price"])
    waiting = asyncio.create_task(tools.run(REQUEST))
    await client.was_asked.wait()
    course.stage = Stage.LEAVING
    assert course.break_off(now=True)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await peer.call(Ping())  # a cancellation would have come before it
    assert not client.cancelled.is_set()


async def test_a_connection_that_left_is_not_asked(connect):
    tools, gone, client = ClientTools(), Client("gone"), Client("there")
    peer = await connect(gone)
    tools.register(await connect(client), ["price"])
    tools.register(peer, ["price"])
    tools.forget(peer)
    assert (await tools.run(REQUEST)).text == "there"
