"""What is interrupted or cancelled in the moment in which its server begins to stop: nothing of it goes on."""

from __future__ import annotations

import asyncio
import io
import os
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from agent_sdk.conversation.store import AgentStore
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import Cancelled, Overloaded
from agent_sdk.protocol.events import TurnEnded
from agent_sdk.protocol.methods.connection import Ping
from agent_sdk.protocol.methods.conversation import SetTitle, ToolCall
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.methods.workspace import Execute
from agent_sdk.remote.workspace import RemoteWorkspace
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.testing import call, hang
from agent_sdk.tools import tool
from agent_server import data_folder, logs
from agent_server.boxes.registry import Boxes
from agent_server.config.options import ServerConfig
from agent_server.conversations.loaded import LoadedConversation
from agent_server.conversations.registry import Conversations
from agent_server.data_folder import DataFolder
from agent_server.metrics import Metrics
from agent_server.work import Work
from tests.contract.vocabulary import acting, these
from tests.server.test_box_process import ENVIRONMENT
from tests.server.wire import GUARD


@pytest.fixture
async def loaded(tmp_path):
    """A conversation in the memory of a server."""
    config = ServerConfig(box_environment=ENVIRONMENT, boxes_on_stop="end")
    folder = DataFolder(tmp_path)
    folder.workspace("c").mkdir(parents=True)
    with logs.opened(style="json", stream=io.StringIO()) as opened:
        async with (
            asyncio.timeout(GUARD),
            EventLog.open(tmp_path / "log.db", sole=True) as log,
            Boxes(config, folder, opened, lambda: None) as boxes,
        ):
            await log.create("c", {})
            loaded = LoadedConversation(
                "c",
                log,
                boxes.link("c"),
                workspace="c",
                store=AgentStore(None),
                logs=opened,
                metrics=Metrics(),
                work=Work(),
            )
            await loaded.open()
            yield loaded
            await loaded.close()


@asynccontextmanager
async def conversations_in(folder):
    """All conversations of a server on this data folder."""
    config = ServerConfig(box_environment=ENVIRONMENT)
    with logs.opened(style="json", stream=io.StringIO()) as opened, data_folder.locked(folder) as data:
        async with (
            asyncio.timeout(GUARD),
            EventLog.open(data.log, sole=True) as log,
            Conversations(config, data, log, opened, Metrics(), Work(), AgentStore(None)) as conversations,
        ):
            yield conversations


@pytest.fixture
async def left(tmp_path):
    """The conversation in which a server left a turn that waits for its model."""
    async with conversations_in(tmp_path) as conversations:
        id = await conversations.create()
        async with conversations.using(id) as loaded:
            await loaded.local.configure(acting(hang()))
            await loaded.local.send_message("go")
    return id


async def test_no_turn_begins_in_a_conversation_that_is_opened_while_the_server_stops(tmp_path, left):
    async with conversations_in(tmp_path) as conversations:
        conversations.wind_down()
        async with conversations.using(left) as loaded:
            assert not loaded.busy
    async with conversations_in(tmp_path) as conversations, conversations.using(left) as loaded:
        assert loaded.busy


async def test_no_turn_begins_in_a_conversation_that_is_being_opened_when_the_server_stops(tmp_path, left):
    async with conversations_in(tmp_path) as conversations:
        opening = asyncio.create_task(conversations.hold(left))
        await asyncio.sleep(0)  # it is in memory, and its log not yet read
        conversations.wind_down()
        loaded = await opening
        assert not loaded.busy
        conversations.let_go(loaded)


READS = {
    "the state": lambda loaded: loaded.state(),
    "the events": lambda loaded: anext(loaded.local.events()),
    "the statistics": lambda loaded: loaded.local.stats(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("opened", ["before the end", "during the end", "after the end"])
async def test_a_read_that_comes_while_the_server_lets_go_of_all_is_told_to_call_again(
    tmp_path, left, opened, read
):
    """Over plain HTTP: a WebSocket is closed before."""

    async def reading(id):
        async with conversations.using(id) as loaded:
            if opened == "before the end":
                ending.set()
                await closed.wait()
            await read(loaded)

    ending, closed = asyncio.Event(), asyncio.Event()
    async with conversations_in(tmp_path) as conversations:
        asked = asyncio.create_task(reading(left)) if opened == "before the end" else None
        if asked is not None:
            await ending.wait()
        closing = asyncio.create_task(conversations.close())
        if opened == "after the end":
            await closing
        if asked is None:
            asked = asyncio.create_task(reading(left))
        await closing
        closed.set()
        with pytest.raises(Overloaded, match="the server is stopping; call again in a moment") as told:
            await asked
        assert told.value.retryable


async def interrupted_while_the_server_begins_to_stop(loaded):
    await asyncio.gather(loaded.local.interrupt("enough"), loaded.wind_down())
    assert [event.status for event in await these(loaded.local, TurnEnded)] == ["interrupted"]


async def test_a_command_of_an_interrupted_turn_does_not_go_on_in_the_box(loaded):
    runs = asyncio.Event()

    @tool
    async def wait() -> str:
        """Wait."""
        await RemoteWorkspace.over(loaded.link).execute(
            "echo; exec sleep 600", on_output=lambda *_: runs.set()
        )
        return ""

    await loaded.local.configure(acting(call("wait"), tools=[wait]))
    await loaded.local.send_message("go")
    await runs.wait()
    await interrupted_while_the_server_begins_to_stop(loaded)
    assert await loaded.link.operations() == frozenset()


async def test_a_command_that_a_tool_gives_up_while_the_server_stops_does_not_go_on_in_the_box(loaded):
    runs, stops = asyncio.Event(), asyncio.Event()

    @tool
    async def wait() -> str:
        """Wait."""
        sleeps = RemoteWorkspace.over(loaded.link).execute(
            "echo; exec sleep 600", on_output=lambda *_: runs.set()
        )
        sleeping = asyncio.create_task(sleeps)
        await stops.wait()
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
        return ""

    await loaded.local.configure(acting(call("wait"), tools=[wait]))
    await loaded.local.send_message("go")
    await runs.wait()
    stopping = asyncio.create_task(loaded.wind_down())
    asyncio.get_running_loop().call_soon(stops.set)
    await stopping
    assert await loaded.link.operations() == frozenset()


async def test_a_tool_of_an_interrupted_turn_does_not_go_on_in_its_client(loaded):
    runs, withdrawn = asyncio.Event(), asyncio.Event()

    async def run_tool(params, call):
        runs.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            withdrawn.set()
            raise

    @tool
    async def wait() -> str:
        """Wait."""
        return ""

    here, there = memory_pipes()
    async with Peer(there, {ToolCall: run_tool}, opener=True), Peer(here, opener=False) as peer:
        loaded.tools.register(peer, ["wait"])
        await loaded.local.configure(acting(call("wait"), tools=[wait]).spec())
        await loaded.local.send_message("go")
        await runs.wait()
        await interrupted_while_the_server_begins_to_stop(loaded)
        await peer.call(Ping())  # a cancellation comes before it
        assert withdrawn.is_set()


async def test_a_command_that_its_caller_cancels_while_the_server_ends_does_not_go_on_in_the_box(loaded):
    fifo = Path((await RemoteWorkspace.over(loaded.link).describe()).root) / "begun"
    os.mkfifo(fifo)
    command = Execute(op_id=new_id(), shell="echo >begun; exec sleep 600")
    async with Peer(memory_pipes()[0], opener=False) as peer:
        running = asyncio.create_task(loaded.forwarded.answer(command, Inbound(peer, 1)))
        await asyncio.to_thread(fifo.read_text)
        running.cancel()
        await loaded.forwarded.close()
        await asyncio.gather(running, return_exceptions=True)
    assert await loaded.link.operations() == frozenset()


async def test_a_caller_of_a_command_that_goes_on_without_its_server_is_told_to_call_again(loaded):
    fifo = Path((await RemoteWorkspace.over(loaded.link).describe()).root) / "begun"
    os.mkfifo(fifo)
    command = Execute(op_id=new_id(), shell="echo >begun; exec sleep 600")
    async with Peer(memory_pipes()[0], opener=False) as peer:
        running = asyncio.create_task(loaded.forwarded.answer(command, Inbound(peer, 1)))
        await asyncio.to_thread(fifo.read_text)
        await loaded.forwarded.close()
        with pytest.raises(Overloaded, match="the server is stopping; call again in a moment"):
            await running
    assert await loaded.link.operations() == frozenset({command.op_id})


async def test_a_caller_of_a_verb_that_the_end_of_its_server_breaks_off_is_told_to_call_again(loaded):
    begun = asyncio.Event()

    async def titling() -> Done:
        begun.set()
        await asyncio.Event().wait()
        return Done()

    call = SetTitle(op_id=new_id(), title="never")
    running = asyncio.create_task(loaded.operations.run(call, titling))
    await begun.wait()
    await loaded.close()
    with pytest.raises(Overloaded, match="the server is stopping; call again in a moment"):
        await running


async def test_a_command_that_two_callers_cancel_and_then_lose_their_connections_is_cancelled_once(loaded):
    fifo = Path((await RemoteWorkspace.over(loaded.link).describe()).root) / "begun"
    os.mkfifo(fifo)
    command = Execute(op_id=new_id(), shell="echo >begun; exec sleep 600")
    async with AsyncExitStack() as connections:
        peers = [
            await connections.enter_async_context(Peer(memory_pipes()[0], opener=False)) for _ in range(2)
        ]
        running = [
            asyncio.ensure_future(loaded.forwarded.answer(command, Inbound(peer, 1))) for peer in peers
        ]
        await asyncio.to_thread(fifo.read_text)
        await loaded.local.set_title("both have come")  # written behind what both have written
    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert await loaded.link.operations() == frozenset()
    async with Peer(memory_pipes()[0], opener=False) as peer:
        with pytest.raises(Cancelled):
            await loaded.forwarded.answer(command, Inbound(peer, 1))
