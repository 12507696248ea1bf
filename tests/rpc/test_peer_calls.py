"""Calls: both ways, answered exactly once, errors keep their class, cancellation has an answer."""

import asyncio
from contextlib import suppress

import anyio
import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    Cancelled,
    ConnectionLost,
    InternalError,
    InvalidParams,
    LimitExceeded,
    MethodNotFound,
    Overloaded,
    PathNotFound,
    TimedOut,
    WorkspaceLost,
)
from agent_sdk.protocol.methods.connection import CancelCall, CancelOutcome, Ping, Pong
from agent_sdk.protocol.methods.conversation import ToolCall, ToolOutput
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.methods.workspace import (
    Describe,
    DiffText,
    FilesMkdir,
    FilesStat,
    GitDiff,
    ProcessList,
)
from agent_sdk.protocol.specs import Limits
from agent_sdk.remote.streams import with_bytes
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from tests.rpc.links import Raw, raw_to_peer

pytestmark = pytest.mark.timeout(30)


class Gate:
    """A handler that waits, and tells what happens to it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.count = 0

    async def __call__(self, params, call):
        self.count += 1
        self.entered.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return DiffText("opened")


async def echo(params, call):
    return DiffText(params.path)


async def test_a_call_returns_what_the_handler_returned(peers):
    async with peers({GitDiff: echo}) as (client, _):
        assert await client.call(GitDiff(path="ä/\0/😀")) == DiffText("ä/\0/😀")


async def test_both_ends_may_call(peers):
    async def tool(params, call):
        return ToolOutput(text=params.arguments.upper())

    async def mkdir(params, call):
        answer = await call.peer.call(ToolCall(request_id="r", call_id="c", tool="t", arguments=params.path))
        assert answer == ToolOutput(text="SRC")
        return Done()

    async with peers({FilesMkdir: mkdir}, own={"handlers": {ToolCall: tool}}) as (client, _):
        assert await client.call(FilesMkdir(op_id=new_id(), path="src")) == Done()


async def test_many_calls_run_at_the_same_time(peers):
    together = asyncio.Barrier(50)

    async def meet(params, call):
        await together.wait()
        return DiffText(params.path)

    async with peers({GitDiff: meet}) as (client, _):
        paths = [str(number) for number in range(50)]
        answers = await asyncio.gather(*(client.call(GitDiff(path=path)) for path in paths))
        assert [answer.text for answer in answers] == paths


async def test_ping_needs_no_handler(peers):
    async with peers() as (client, server):
        assert await client.call(Ping()) == await server.call(Ping()) == Pong()


async def test_ping_may_have_a_handler(peers):
    async def refuse(params, call):
        raise InvalidParams("first say who you are")

    async with peers({Ping: refuse}) as (client, _):
        with pytest.raises(InvalidParams, match="who you are"):
            await client.call(Ping())


async def test_handlers_may_be_replaced_while_the_connection_lives(peers):
    async with peers() as (client, server):
        with pytest.raises(MethodNotFound, match=r"git\.diff"):
            await client.call(GitDiff())
        server.handlers = {**server.handlers, GitDiff: echo}
        assert await client.call(GitDiff(path="x")) == DiffText("x")


async def test_an_error_keeps_its_class_its_text_and_its_details(peers):
    async def stat(params, call):
        raise PathNotFound(f"no such file: {params.path}", path=params.path)

    async with peers({FilesStat: stat}) as (client, _):
        with pytest.raises(FileNotFoundError) as caught:
            await client.call(FilesStat(path="nowhere"))
        assert type(caught.value) is PathNotFound
        assert (str(caught.value), caught.value.details) == ("no such file: nowhere", {"path": "nowhere"})


async def test_what_no_text_can_say_is_escaped_in_an_error(peers):
    async def stat(params, call):
        raise PathNotFound("no such file: a\udcff", path="a\udcff", tried=["b\ud800", ("\udcff",)])

    async with peers({FilesStat: stat}) as (client, _):
        with pytest.raises(PathNotFound) as caught:
            await client.call(FilesStat(path="nowhere"))
        assert str(caught.value) == r"no such file: a\udcff"
        assert caught.value.details == {"path": r"a\udcff", "tried": [r"b\ud800", [r"\udcff"]]}


async def test_an_error_that_json_cannot_say_is_a_bug(peers):
    bugs = []

    async def strange(params, call):
        raise PathNotFound("no such file", path=object())

    async with peers({GitDiff: strange}, on_bug=lambda exc, _: bugs.append(exc)) as (client, _):
        with pytest.raises(InternalError):
            await client.call(GitDiff())
        assert len(bugs) == 1
        assert await client.call(Ping()) == Pong()


async def test_a_bug_is_reported_here_and_named_there(peers):
    bugs = []

    async def buggy(params, call):
        raise ZeroDivisionError("secret")

    async with peers({GitDiff: buggy}, on_bug=lambda exc, incident: bugs.append((exc, incident))) as (
        client,
        _,
    ):
        with pytest.raises(InternalError) as caught:
            await client.call(GitDiff())
        [(exc, incident)] = bugs
        assert isinstance(exc, ZeroDivisionError)
        assert (str(caught.value), caught.value.details) == ("internal error", {"incident": incident})


async def test_a_result_that_json_cannot_say_is_a_bug(peers):
    bugs = []

    async def strange(params, call):
        return object()

    async with peers({GitDiff: strange}, on_bug=lambda exc, _: bugs.append(exc)) as (client, _):
        with pytest.raises(InternalError):
            await client.call(GitDiff())
        assert len(bugs) == 1
        assert await client.call(Ping()) == Pong()


async def test_a_result_of_another_shape_is_the_other_ends_bug(peers):
    async def wrong(params, call):
        return {"words": "none"}

    async with peers({GitDiff: wrong}) as (client, _):
        with pytest.raises(InternalError, match=r"git\.diff makes no sense"):
            await client.call(GitDiff())


async def test_a_bug_without_a_listener_goes_to_the_event_loop(peers):
    async def buggy(params, call):
        raise ZeroDivisionError

    seen = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
    async with peers({GitDiff: buggy}) as (client, _):
        with pytest.raises(InternalError):
            await client.call(GitDiff())
    assert [type(exc) for exc in seen] == [ZeroDivisionError]


async def test_a_lost_connection_behind_a_handler_is_a_lost_workspace(peers):
    async def behind(params, call):
        raise ConnectionLost("the box is gone")

    async with peers({GitDiff: behind}) as (client, _):
        with pytest.raises(WorkspaceLost, match="the box is gone"):
            await client.call(GitDiff())


async def test_a_call_longer_than_the_other_end_accepts_is_not_sent(peers):
    async with peers({GitDiff: echo}) as (client, _):
        client.other_limits = Limits(message_bytes=1000)
        with pytest.raises(LimitExceeded) as caught:
            await client.call(GitDiff(path="x" * 1000))
        assert caught.value.details["limit"] == 1000
        assert len(client.calls) == 0


async def test_an_answer_longer_than_the_other_end_accepts_is_an_error(peers):
    async with peers({GitDiff: echo}) as (client, server):
        server.other_limits = Limits(message_bytes=1000)
        with pytest.raises(LimitExceeded):
            await client.call(GitDiff(path="x" * 1000))


# -- cancellation


async def test_cancelling_a_call_cancels_its_handler_and_waits_for_it(peers):
    gate, order = Gate(), []

    async def slow_to_end(params, call):
        try:
            return await gate(params, call)
        finally:
            await call.peer.call(Ping())
            order.append("handler")

    async with peers({GitDiff: slow_to_end}) as (client, server):
        calling = asyncio.create_task(client.call(GitDiff()))
        await gate.entered.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        order.append("caller")
        assert order == ["handler", "caller"]
        assert len(client.calls) == len(server._answers) == 0


async def test_a_call_whose_time_is_over_is_cancelled(peers):
    gate = Gate()
    async with peers({GitDiff: gate}) as (client, _):
        with pytest.raises(TimedOut) as caught:
            await client.call(GitDiff(), timeout=0.05)
        assert caught.value.details == {"seconds": 0.05}
        assert gate.cancelled.is_set()


async def test_the_other_ends_time_out_is_no_time_out_of_ours(peers):
    async def late(params, call):
        raise TimedOut("the disk is slow", seconds=3)

    async with peers({GitDiff: late}) as (client, _):
        with pytest.raises(TimedOut, match="the disk is slow"):
            await client.call(GitDiff(), timeout=20)


@pytest.mark.parametrize("waited", [lambda calling: calling, with_bytes], ids=["call", "call with bytes"])
async def test_a_cancel_scope_of_anyio_works_like_a_cancelled_task(peers, waited):
    gate = Gate()
    async with peers({GitDiff: gate}) as (client, _):
        with anyio.move_on_after(0.05) as scope:
            await waited(client.call(GitDiff()))
        assert scope.cancelled_caught
        assert gate.cancelled.is_set()


async def test_a_second_cancellation_does_not_wait_for_the_answer(peers):
    asked, stubborn = asyncio.Event(), asyncio.Event()

    async def handler(params, call):
        with suppress(asyncio.CancelledError):
            asked.set()
            await asyncio.Event().wait()
        await stubborn.wait()
        return DiffText("")

    async with peers({GitDiff: handler}) as (client, _):
        calling = asyncio.create_task(client.call(GitDiff()))
        await asked.wait()
        calling.cancel()
        await client.call(Ping())
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        stubborn.set()


async def test_a_call_answered_at_the_moment_it_is_cancelled_needs_no_cancelling():
    here, there = memory_pipes()
    raw, calling = Raw(there), None

    def cancel(method, params):
        calling.cancel()

    async with Peer(here, opener=True, on_notice=cancel) as client:
        calling = asyncio.create_task(client.call(Ping()))
        id = (await raw.receive())["id"]
        await raw.send({"jsonrpc": "2.0", "id": id, "result": {}})
        await raw.send({"jsonrpc": "2.0", "method": "draining", "params": {}})
        with pytest.raises(asyncio.CancelledError):
            await calling
        again = asyncio.create_task(client.call(Ping()))
        assert (await raw.receive())["method"] == "ping"
        again.cancel()
        assert (await raw.receive())["method"] == "call.cancel"
        await there.close()
        with pytest.raises(asyncio.CancelledError):
            await again


async def test_cancel_says_what_became_of_the_call():
    gate = Gate()
    async with raw_to_peer({GitDiff: gate}) as (raw, _):
        await raw.call("a", "git.diff")
        await gate.entered.wait()
        await raw.call("b", "call.cancel", id="a")
        answers = [await raw.receive(), await raw.receive()]
        assert [answer["id"] for answer in answers] == ["a", "b"]
        assert (answers[0]["error"]["code"], answers[1]["result"]) == (-32800, {"outcome": "cancelled"})
        await raw.call("c", "call.cancel", id="a")
        assert (await raw.receive())["result"] == {"outcome": "already_done"}


async def test_a_call_that_cannot_be_cancelled_is_answered_all_the_same():
    entered = asyncio.Event()

    async def careless(params, call):
        with suppress(asyncio.CancelledError):
            entered.set()
            await asyncio.Event().wait()
        return DiffText("done anyway")

    async with raw_to_peer({GitDiff: careless}) as (raw, _):
        await raw.call(1, "git.diff")
        await entered.wait()
        await raw.call(2, "call.cancel", id=1)
        assert (await raw.receive())["result"] == {"text": "done anyway"}
        assert (await raw.receive())["result"] == {"outcome": "not_cancellable"}


async def test_a_call_cancelled_in_the_step_in_which_it_ends_is_answered_once():
    async def late(params, call):
        call.task.cancel()
        return DiffText("done")

    async with raw_to_peer({GitDiff: late}) as (raw, _):
        await raw.call(1, "git.diff")
        assert (await raw.receive())["result"] == {"text": "done"}
        await raw.call(2, "ping")
        assert (await raw.receive())["id"] == 2


async def test_a_call_cancelled_before_its_handler_began_is_answered():
    gate = Gate()
    async with raw_to_peer({GitDiff: gate}) as (raw, _):
        await raw.call(1, "git.diff")
        await raw.call(2, "call.cancel", id=1)
        assert (await raw.receive())["error"]["data"]["kind"] == "cancelled"
        assert (await raw.receive())["result"] == {"outcome": "cancelled"}


async def test_the_notification_of_the_language_server_protocol_cancels_too():
    gate = Gate()
    async with raw_to_peer({GitDiff: gate}) as (raw, peer):
        await raw.call(1, "git.diff")
        await gate.entered.wait()
        for params in ({"id": True}, {}, {"id": 2}, {"id": 1}):
            await raw.send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": params})
        assert (await raw.receive())["error"]["code"] == -32800
        assert peer.ignored["illegible notice"] == 2


async def test_asking_for_a_cancellation_often_is_refused():
    stubborn, entered = asyncio.Event(), asyncio.Event()

    async def handler(params, call):
        entered.set()
        while not stubborn.is_set():
            with suppress(asyncio.CancelledError):
                await stubborn.wait()
        return DiffText("")

    async with raw_to_peer({GitDiff: handler}) as (raw, _):
        await raw.call(0, "git.diff")
        await entered.wait()
        for number in range(1, 18):
            await raw.call(number, "call.cancel", id=0)
        assert (await raw.receive())["error"]["code"] == Overloaded.code
        stubborn.set()
        assert [(await raw.receive())["id"] for _ in range(17)] == list(range(17))


async def test_a_handler_that_ends_cancelled_by_itself_is_a_cancelled_call(peers):
    async def handler(params, call):
        raise asyncio.CancelledError

    async with peers({GitDiff: handler}) as (client, _):
        with pytest.raises(Cancelled):
            await client.call(GitDiff())


async def test_cancelling_with_the_method_itself_is_possible(peers):
    async with peers() as (client, _):
        assert await client.call(CancelCall(id=12345)) == CancelOutcome("already_done")


# -- how many at once


async def test_more_calls_than_the_limit_are_refused_and_the_others_go_on():
    gate = Gate()
    async with raw_to_peer({GitDiff: gate}) as (raw, _):
        for number in range(65):
            await raw.call(number, "git.diff")
        refused = await raw.receive()
        assert refused["id"] == 64
        assert refused["error"]["data"] == {
            "limit": 64,
            "retry_after_ms": 250,
            "kind": "overloaded",
            "retryable": True,
        }
        await raw.call("p", "ping")
        assert (await raw.receive())["id"] == "p"
        gate.open.set()
        assert {(await raw.receive())["id"] for _ in range(64)} == set(range(64))
        await raw.call(65, "git.diff")
        assert (await raw.receive())["id"] == 65


async def test_our_own_calls_wait_for_their_turn_in_order(peers):
    turns, running = [], 0

    async def one_at_a_time(params, call):
        nonlocal running
        running += 1
        assert running == 1
        turns.append(params.path)
        await call.peer.call(Ping())
        running -= 1
        return DiffText("")

    async with peers({GitDiff: one_at_a_time}, limits=Limits(calls=1)) as (client, _):
        client.other_limits = Limits(calls=1)
        await asyncio.gather(*(client.call(GitDiff(path=str(number))) for number in range(20)))
        assert turns == [str(number) for number in range(20)]


async def test_a_call_cancelled_while_it_waits_for_its_turn_is_never_sent(peers):
    gate = Gate()
    async with peers({GitDiff: gate, ProcessList: echo}) as (client, _):
        client.other_limits = Limits(calls=1)
        first = asyncio.create_task(client.call(GitDiff()))
        await gate.entered.wait()
        with pytest.raises(TimedOut):
            await client.call(GitDiff(), timeout=0.01)
        assert await client.call(Ping()) == Pong()  # never waits for a turn
        gate.open.set()
        assert await first == DiffText("opened")
        assert gate.count == 1
        assert await client.call(GitDiff()) == DiffText("opened")


async def test_a_turn_given_to_a_call_that_is_cancelled_goes_to_the_next(peers):
    async with peers({GitDiff: echo}) as (client, _):
        client.other_limits = Limits(calls=1)

        async def call_and_cancel_the_next():
            await client.call(GitDiff(path="1"))
            second.cancel()  # in the very step in which its turn came

        first = asyncio.create_task(call_and_cancel_the_next())
        second, third = (asyncio.create_task(client.call(GitDiff(path=path))) for path in "23")
        assert await third == DiffText("3")
        assert first.done() and second.cancelled()


async def test_a_greater_limit_lets_waiting_calls_go_at_once(peers):
    gate = Gate()
    async with peers({GitDiff: gate}) as (client, _):
        client.other_limits = Limits(calls=1)
        calls = [asyncio.create_task(client.call(GitDiff())) for _ in range(3)]
        await gate.entered.wait()
        client.other_limits = Limits()
        gate.open.set()
        assert await asyncio.gather(*calls) == [DiffText("opened")] * 3


async def test_an_id_whose_answer_has_not_left_is_still_in_use():
    third = asyncio.Event()

    async def big(params, call):
        if call.id == 3:
            third.set()
        return DiffText("x" * 200_000)

    async with raw_to_peer({GitDiff: big}) as (raw, _):
        for id in (1, 2, 3):
            await raw.call(id, "git.diff")
        await third.wait()
        await asyncio.sleep(0)  # its answer waits: two fill the pipe
        await asyncio.sleep(0)
        await raw.call(3, "git.diff")
        answers = [await raw.receive() for _ in range(4)]
        assert sorted(answer["id"] for answer in answers) == [1, 2, 3, 3]
        [refused] = [answer for answer in answers if "error" in answer]
        assert refused["error"]["data"]["kind"] == "bad_id"


async def test_an_id_in_flight_is_refused_and_may_be_used_again_after_the_answer():
    gate = Gate()
    async with raw_to_peer({GitDiff: gate}) as (raw, _):
        await raw.call("a", "git.diff")
        await gate.entered.wait()
        for method in ("git.diff", "ping", "call.cancel", "nothing"):
            await raw.call("a", method, id="a")
            refused = await raw.receive()
            assert (refused["id"], refused["error"]["message"]) == ("a", "id a is in flight")
            assert refused["error"]["data"] == {"kind": "bad_id", "retryable": False, "id": "a"}
        await raw.call("b", "call.cancel", id="a")
        gate.open.set()
        assert [(await raw.receive())["id"] for _ in range(2)] == ["a", "b"]
        for id in ("a", "b"):
            await raw.call(id, "git.diff")
            assert "result" in await raw.receive()


async def test_the_id_of_a_cancellation_that_waits_is_in_flight():
    stubborn, entered = asyncio.Event(), asyncio.Event()

    async def handler(params, call):
        entered.set()
        with suppress(asyncio.CancelledError):
            await stubborn.wait()
        await stubborn.wait()
        return DiffText("")

    async with raw_to_peer({GitDiff: handler}) as (raw, _):
        await raw.call(1, "git.diff")
        await entered.wait()
        await raw.call(2, "call.cancel", id=1)
        await raw.call(2, "ping")
        assert (await raw.receive())["error"]["data"]["kind"] == "bad_id"
        stubborn.set()
        assert [(await raw.receive())["id"] for _ in range(2)] == [1, 2]


async def test_an_answer_that_nobody_awaits_is_ignored_and_counted():
    here, there = memory_pipes()
    async with Peer(there, opener=True) as peer:
        raw = Raw(here)
        calling = asyncio.create_task(peer.call(GitDiff()))
        id = (await raw.receive())["id"]
        for answer in (id + 1, str(id)):
            await raw.send({"jsonrpc": "2.0", "id": answer, "result": {"text": "not that one"}})
        for _ in range(2):
            await raw.send({"jsonrpc": "2.0", "id": id, "result": {"text": "that one"}})
        assert await calling == DiffText("that one")
        await raw.send({"jsonrpc": "2.0", "id": id, "error": {"code": 1, "message": "late"}})
        await raw.call(1, "ping")
        await raw.receive()
        assert peer.ignored["answer nobody awaits"] == 4
        await here.close()


async def test_a_peer_shows_its_state(peers):
    gate = Gate()
    async with peers({GitDiff: gate, Describe: echo}) as (client, server):
        calling = asyncio.create_task(client.call(GitDiff()))
        await gate.entered.wait()
        assert repr(client) == "<Peer open: 0 calls in, 1 calls out>"
        assert repr(server) == "<Peer open: 1 calls in, 0 calls out>"
        gate.open.set()
        await calling
    assert repr(client) == "<Peer closed: 0 calls in, 0 calls out>"
