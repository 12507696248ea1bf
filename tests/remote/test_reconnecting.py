"""A lost connection is made again, and nobody who waits for something notices more than a delay."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest
from aiohttp import web

from agent_sdk import Agent, Conversation, RemoteWorkspace, tool
from agent_sdk.ids import new_id
from agent_sdk.protocol import frame
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    LimitExceeded,
    Overloaded,
    PolicyDenied,
    TimedOut,
    Unauthorized,
)
from agent_sdk.protocol.events import Interrupted, PauseRequested, ToolReturned, TurnEnded, TurnStarted
from agent_sdk.protocol.methods.connection import ClientInfo, Initialized
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.protocol.methods.workspace import Describe
from agent_sdk.protocol.specs import PROTOCOL_VERSION, SUBPROTOCOL, Limits
from agent_sdk.remote.link import ask
from agent_sdk.remote.reconnecting import ServerLink, Target, final_error
from agent_sdk.rpc.pipe import lost
from agent_sdk.testing import ScriptedLLM, call, hang, say

STOPS = (PauseRequested, Interrupted, TurnEnded)
AGENT = Agent(llm=ScriptedLLM([say("done")]))


@asynccontextmanager
async def connected(server, proxy, **options):
    """A workspace whose connection goes through the proxy; its box does not outlive the test."""
    url = f"http://127.0.0.1:{proxy.port}"
    async with RemoteWorkspace(url, server.api_key, **options) as workspace:
        try:
            yield workspace
        finally:
            await remove(server, workspace.conversation)


async def remove(server, id: str) -> None:
    async with RemoteWorkspace(server.url, server.api_key, conversation=id) as direct:
        await ask(direct.link, Delete(op_id=new_id()))


class Said:
    """What a link tells of its connection."""

    def __init__(self) -> None:
        self.reasons: list[AgentServerError | None] = []
        self._news = asyncio.Event()

    def __call__(self, reason: AgentServerError | None) -> None:
        self.reasons.append(reason)
        self._news.set()

    async def first(self) -> AgentServerError | None:
        await self._news.wait()
        return self.reasons[0]


# --- calls ---


async def test_a_command_goes_on_and_its_output_comes_once_while_the_connection_is_lost_again_and_again(
    running_server, proxy
):
    heard: list[bytes] = []

    async def hear(_: str, data: bytes) -> None:
        heard.append(data)
        if len(heard) % 3 == 0:
            proxy.cut(reset=len(heard) % 2 == 0)

    async with connected(running_server, proxy) as workspace:
        script = "echo once >> runs; for i in $(seq 20); do echo $i; sleep 0.02; done"
        result = await workspace.execute(script, on_output=hear)
        expected = "".join(f"{number}\n" for number in range(1, 21))
        assert (result.exit_code, result.stdout, b"".join(heard).decode()) == (0, expected, expected)
        assert await workspace.files.read("runs") == b"once\n"
    assert proxy.connections > 3


async def test_a_process_is_fed_and_followed_over_many_connections(running_server, proxy):
    async with connected(running_server, proxy) as workspace:
        process = await workspace.start(["cat"])
        output = process.output()
        said = b""
        for number in range(30):
            await process.write(f"line {number}\n".encode())
            if number % 3 == 0:
                proxy.cut()
            while said.count(b"\n") <= number:
                said += await anext(output)
        await process.close_stdin()
        assert (await process.wait()).exit_code == 0
        assert said == b"".join(b"line %d\n" % number for number in range(30))
        await output.aclose()


async def test_a_command_without_a_listener_returns_all_its_output_over_the_next_connection(
    running_server, proxy, tmp_path
):
    go = tmp_path / "go"
    os.mkfifo(go)
    async with connected(running_server, proxy) as workspace:
        running = asyncio.create_task(workspace.execute(f"echo begun > begun; cat {go}; seq 5; exit 3"))
        while not [entry for entry in await workspace.files.list() if entry.path == "begun"]:
            pass
        proxy.cut()
        await workspace.describe()
        await asyncio.to_thread(go.write_bytes, b"on\n")
        result = await running
        assert (result.exit_code, result.stdout) == (3, "on\n1\n2\n3\n4\n5\n")


async def test_cancelling_returns_at_once_while_there_is_no_connection(running_server, proxy):
    said = Said()
    async with connected(running_server, proxy, on_connection=said) as workspace:
        proxy.refuse = True
        proxy.cut()
        assert isinstance(await said.first(), ConnectionLost)
        waiting = asyncio.create_task(workspace.execute("true"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        proxy.refuse = False
        assert (await workspace.execute("echo back")).stdout == "back\n"
        assert said.reasons[-1] is None


async def test_waiting_for_a_process_ends_in_time_although_there_is_no_connection(running_server, proxy):
    async with connected(running_server, proxy) as workspace:
        process = await workspace.start("sleep 600")
        proxy.refuse = True
        proxy.cut()
        with pytest.raises(TimedOut):
            await process.wait(0.05)
        proxy.refuse = False
        await process.signal("KILL")
        assert (await process.wait()).signal == 9


async def test_files_arrive_whole_although_connections_break_in_their_middle(running_server, proxy, tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "here").write_bytes(content)
    async with connected(running_server, proxy) as workspace:
        proxy.cuts += [("up", 700_000), ("up", 1_500_000)]
        proxy.cut()
        sent = await workspace.upload(tmp_path / "here", "there")
        proxy.cuts += [("down", 700_000), ("down", 1_500_000)]
        proxy.cut()
        got = await workspace.download("there", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
        assert (sent.size, got.sha256) == (len(content), sent.sha256)


async def test_bytes_that_can_be_read_once_go_on_while_they_are_kept_here_or_there(running_server, proxy):
    async def once():
        for number in range(60):
            yield bytes([number]) * 100_000
            if number in (1, 20):
                proxy.cut()

    async def lost():
        async for data in once():
            yield data
        os.kill((await workspace.describe()).pid, signal.SIGKILL)
        proxy.cut()
        yield b"more"

    async with connected(running_server, proxy) as workspace:
        assert (await workspace.write_stream("it", once())).size == 6_000_000
        with pytest.raises(ConnectionLost):  # the box had what is not kept here any more
            await workspace.write_stream("that", lost())
        assert [info.path for info in await workspace.files.list()] == ["it"]


async def test_a_connection_that_fell_silent_is_given_up(running_server, proxy):
    said = Said()
    async with connected(running_server, proxy, heartbeat=0.1, on_connection=said) as workspace:
        proxy.hold()
        waiting = asyncio.create_task(workspace.execute("echo here"))
        assert isinstance(await said.first(), ConnectionLost)
        proxy.flow()
        assert (await waiting).stdout == "here\n"


# --- conversations ---


async def test_run_waits_on_and_callbacks_see_each_event_once(running_server, proxy):
    seen: list[int] = []

    def see(event) -> None:
        seen.append(event.seq)
        if event.seq % 2 == 0:
            proxy.cut()

    async with connected(running_server, proxy) as workspace:
        steps = [call("terminal", command=f"echo {number}") for number in range(5)]
        agent = Agent(llm=ScriptedLLM([*steps, say("done")]))
        conversation = Conversation(agent, workspace, callbacks=[see])
        await conversation.send_message("go")
        assert (await conversation.run()).final_text == "done"
        assert seen == list(range(1, (await conversation.state()).head_seq + 1))
    assert proxy.connections > 5


async def test_a_callback_that_runs_while_the_connection_is_lost_is_not_called_again(running_server, proxy):
    seen: list[int] = []
    reconnected = asyncio.Event()

    async def see(event) -> None:
        seen.append(event.seq)
        if event.seq == 3:
            proxy.cut()
            await reconnected.wait()

    def tell(reason: AgentServerError | None) -> None:
        if reason is None:
            reconnected.set()

    async with connected(running_server, proxy, on_connection=tell) as workspace:
        conversation = Conversation(AGENT, workspace, callbacks=[see])
        await conversation.send_message("go")
        await conversation.run()
        assert seen == list(range(1, len(seen) + 1))


async def test_a_tool_of_the_client_runs_once_although_it_is_asked_for_again(running_server, proxy):
    runs: list[str] = []
    asked_again = asyncio.Event()

    @tool
    async def ask_me(question: str) -> str:
        """Ask the user."""
        runs.append(question)
        proxy.cut()
        await asked_again.wait()
        return "forty-two"

    def tell(reason: AgentServerError | None) -> None:
        if reason is None:
            asked_again.set()

    async with connected(running_server, proxy, on_connection=tell) as workspace:
        agent = Agent(llm=ScriptedLLM([call("ask_me", question="what?"), say("done")]), tools=[ask_me])
        conversation = Conversation(agent, workspace)
        await conversation.send_message("go")
        await conversation.run()
        results = [event.text async for event in conversation.events() if hasattr(event, "bytes_cut")]
    assert (runs, results) == (["what?"], ["forty-two"])


@pytest.mark.parametrize("verb", ["interrupt", "pause", "message"])
async def test_what_stops_a_turn_and_arrives_after_its_end_does_not_hit_the_next_one(
    running_server, proxy, verb
):
    async with connected(running_server, proxy) as workspace:
        agent = Agent(llm=ScriptedLLM([hang()], repeat=True), tools=[])
        begun = asyncio.Event()
        late = Conversation(
            agent,
            workspace,
            callbacks=[lambda event: begun.set() if isinstance(event, TurnStarted) else None],
        )
        await late.send_message("go")
        await begun.wait()
        elsewhere = RemoteWorkspace(
            running_server.url, running_server.api_key, conversation=workspace.conversation
        )
        async with elsewhere:
            other = Conversation(None, elsewhere, id=late.id)
            await other.state()
            proxy.refuse = True
            proxy.cut()
            stops = {
                "interrupt": late.interrupt,
                "pause": late.pause,
                "message": lambda: late.send_message("stop", mode="interrupt"),
            }
            stopping = asyncio.create_task(stops[verb]())
            await other.interrupt()
            next_turn = await other.send_message("and now this")
            proxy.refuse = False
            await stopping
            assert (await other.state()).run_id == next_turn.run_id
            kinds = [event async for event in other.events(next_turn.seq) if isinstance(event, STOPS)]
            assert kinds == []
            await other.interrupt()
            assert (await other.run()).run_id == next_turn.run_id


async def test_a_tool_whose_client_closes_its_conversation_is_run_by_another_client(running_server):
    asked = asyncio.Event()

    def agent(answer) -> Agent:
        @tool
        async def ask_me() -> str:
            """Ask the user."""
            return await answer()

        return Agent(llm=ScriptedLLM([call("ask_me"), call("ask_me"), say("done")]), tools=[ask_me])

    async def never() -> str:
        asked.set()
        return await asyncio.get_running_loop().create_future()

    async def at_once() -> str:
        return "forty-two"

    url, key = running_server.url, running_server.api_key
    async with RemoteWorkspace(url, key) as here:
        stays = Conversation(agent(at_once), here)
        await stays.state()
        async with RemoteWorkspace(url, key, conversation=stays.id) as elsewhere:
            leaves = Conversation(agent(never), elsewhere, id=stays.id)
            await leaves.send_message("go")
            await asked.wait()
            await leaves.close()  # its workspace keeps the connection
            assert (await stays.run()).final_text == "done"
        returned = [event.text async for event in stays.events() if isinstance(event, ToolReturned)]
        assert returned == ["forty-two", "forty-two"]
        await stays.delete()


async def test_closing_returns_at_once_while_there_is_no_connection(running_server, proxy):
    url = f"http://127.0.0.1:{proxy.port}"
    async with RemoteWorkspace(url, running_server.api_key) as workspace:
        conversation = Conversation(AGENT, workspace)
        await conversation.send_message("go")
        await conversation.run()
        proxy.refuse = True
        proxy.cut()
        told = asyncio.Event()
        waiting = asyncio.create_task(conversation.run(on_waiting=lambda _: told.set()))
        await told.wait()  # that there is no connection
        await conversation.close()
        with pytest.raises(AgentServerError):
            await waiting
    proxy.refuse = False
    await remove(running_server, conversation.id)


async def test_a_conversation_that_another_client_deleted_ends_every_wait(running_server, proxy):
    url = f"http://127.0.0.1:{proxy.port}"
    async with RemoteWorkspace(url, running_server.api_key) as workspace:
        agent = Agent(llm=ScriptedLLM([call("terminal", command="sleep 600")]))
        conversation = Conversation(agent, workspace)
        await conversation.send_message("go")
        events = conversation.events(follow=True)
        while (await anext(events)).__struct_config__.tag != "tool_called":
            pass
        waits = [asyncio.create_task(work) for work in (all_of(events), conversation.run())]
        await conversation.state()
        await remove(running_server, conversation.id)
        rest, outcome = await asyncio.gather(*waits, return_exceptions=True)
        assert isinstance(rest, ConversationNotFound)
        # Deleting interrupts the turn; its end may be told before the conversation is gone.
        assert isinstance(outcome, ConversationNotFound) or outcome.status == "interrupted"
        with pytest.raises(ConversationNotFound):
            await workspace.describe()


async def all_of(events) -> list:
    return [event async for event in events]


async def test_deleting_twice_is_deleting_once(running_server, proxy):
    url = f"http://127.0.0.1:{proxy.port}"
    async with RemoteWorkspace(url, running_server.api_key) as workspace:
        conversation = Conversation(AGENT, workspace)
        await conversation.state()
        await remove(running_server, conversation.id)
        await conversation.delete()


# --- the first connection ---


async def test_the_first_connection_is_tried_again_until_there_is_a_server(running_server, proxy):
    proxy.refuse = True

    def tell(reason: AgentServerError | None) -> None:
        proxy.refuse = False

    async with connected(running_server, proxy, on_connection=tell) as workspace:
        assert (await workspace.execute("echo hi")).stdout == "hi\n"


async def test_a_conversation_is_made_once_although_the_answer_to_the_first_request_is_lost(
    running_server, proxy
):
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {running_server.api_key}"}) as http:

        async def ids() -> set[str]:
            async with http.get(f"{running_server.url}/v1/conversations") as answer:
                return {each["id"] for each in await answer.json()}

        before = await ids()
        proxy.cuts += [("down", size) for size in (200, 300, 400)]
        async with connected(running_server, proxy) as workspace:
            assert await ids() - before == {workspace.conversation}
    assert proxy.connections == 4


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, Unauthorized),
        (403, PolicyDenied),
        (404, ConnectionLost),
        (421, PolicyDenied),
        (400, ConnectionLost),
        (302, ConnectionLost),
    ],
)
async def test_an_answer_that_stays_the_same_is_asked_for_once(status, error):
    async with answering([status]) as (url, asked):
        with pytest.raises(error):
            async with RemoteWorkspace(url, "key", connect_timeout=None):
                pass
        assert asked == [status]


@pytest.mark.parametrize(("status", "error"), [(429, Overloaded), (503, Overloaded), (502, ConnectionLost)])
async def test_a_server_that_is_busy_is_asked_again(status, error):
    async with answering([status, status, 401]) as (url, asked):
        with pytest.raises(Unauthorized):
            async with RemoteWorkspace(url, "key", connect_timeout=None):
                pass
        assert asked == [status, status, 401]
    async with answering([status] * 1000) as (url, asked):
        with pytest.raises(error):
            async with RemoteWorkspace(url, "key", connect_timeout=0.05):
                pass


@asynccontextmanager
async def answering(statuses: list[int]):
    """A server that answers so, one request after the other, and wants to be asked again at once."""
    asked: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(statuses[len(asked)])
        return web.Response(status=asked[-1], headers={"Retry-After": "0"})

    runner = web.AppRunner(web.Application())
    runner.app.router.add_route("GET", "/{any:.*}", answer)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", asked
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (4401, Unauthorized),
        (4403, PolicyDenied),
        (4404, ConversationNotFound),
        (4413, LimitExceeded),
        (4400, ConnectionLost),
        *((code, None) for code in (1000, 1001, 1006, 1011, 1012, 1013, 4408, 4410, 4429, 4503)),
    ],
)
def test_only_what_cannot_become_better_is_final(code, error):
    final = final_error(lost(code, "why"))
    assert (final and type(final)) == error
    assert final is None or "why" in str(final)


# --- what stays ---


async def test_two_hundred_connections_leave_nothing_behind(running_server, proxy):
    async with connected(running_server, proxy) as workspace:
        seen: list[int] = []
        conversation = Conversation(AGENT, workspace, callbacks=[lambda event: seen.append(event.seq)])
        await conversation.state()
        before = here()
        for number in range(200):
            proxy.cut(reset=number % 2 == 0)
            await conversation.state()
        assert here() <= before
        await conversation.send_message("go")
        await conversation.run()
        assert seen == list(range(1, len(seen) + 1))
    assert proxy.connections >= 200


def here() -> tuple[int, int]:
    """How many tasks and descriptors this process has."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


@pytest.mark.timeout(40)  # less than the pause that the server asks for
async def test_whoever_knows_that_the_server_is_back_may_have_it_tried_at_once(aiohttp_server):
    asked = asyncio.Queue()

    async def busy(request):
        asked.put_nowait(request)
        return web.Response(status=503, headers={"Retry-After": "60"})

    app = web.Application()
    app.router.add_get("/{anything:.*}", busy)
    server = await aiohttp_server(app)
    target = Target(url=str(server.make_url("")), conversation=new_id(), connect_timeout=None)
    link = ServerLink(target)
    entering = asyncio.create_task(link.__aenter__())
    await asked.get()
    link.retry_now()
    await asked.get()
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering


@pytest.mark.parametrize("way", ["before it carries anything", "in the middle of an answer"])
async def test_a_connection_that_dies_without_progress_is_made_again_less_and_less_often(aiohttp_server, way):
    made: list[float] = []

    async def drop(request):
        made.append(asyncio.get_running_loop().time())
        socket = web.WebSocketResponse(protocols=[SUBPROTOCOL])
        await socket.prepare(request)
        call = msgspec.json.decode((await socket.receive()).data)
        answer = Initialized(
            protocol_version=PROTOCOL_VERSION,
            server=ClientInfo(name="short-lived", version="1"),
            limits=Limits(),
            connection_id=new_id(),
            heartbeat_s=20,
        )
        message = {"jsonrpc": "2.0", "id": call["id"], "result": answer}
        await socket.send_str(msgspec.json.encode(message).decode())
        await socket.receive()
        if way == "in the middle of an answer":
            await socket.send_bytes(frame.piece(1, 0, b"x" * 1000, last=False))
        await socket.close()
        return socket

    app = web.Application()
    app.router.add_get("/{anything:.*}", drop)
    server = await aiohttp_server(app)
    target = Target(
        url=str(server.make_url("")), conversation=new_id(), connect_timeout=None, reconnect_timeout=1.0
    )
    async with ServerLink(target) as link:
        with pytest.raises(ConnectionLost, match="drops them before anything comes of them"):
            await ask(link, Describe())
    assert 2 < len(made) < 100
