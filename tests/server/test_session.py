"""One WebSocket: initialize, events, the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from agent_sdk.ids import new_id
from tests.server.conftest import KEY
from tests.server.wire import CLOSE, GUARD, TEXT, call, frame

SAY = {"kind": "scripted", "steps": [{"step": "say", "text": "hello"}]}


def agent(*steps: dict, tools=(), client_tools=()) -> dict:
    llm = {"kind": "scripted", "steps": list(steps) or SAY["steps"]}
    return {"llm": llm, "tools": list(tools), "client_tools": list(client_tools)}


async def configure(wire, **options) -> None:
    answer = await wire.call("conversation.configure", "conf", op_id=new_id(), agent=agent(), **options)
    assert "result" in answer, answer


async def events(wire, until: str) -> list[dict]:
    """The events of the stream up to one of this type."""
    found: list[dict] = []
    while not found or found[-1]["type"] != until:
        message = await wire.message()
        if message.get("method") == "events":
            found += message["params"]["events"]
    return found


# --- initialize ---


async def test_a_new_conversation_begins_with_an_event_that_says_so(server):
    async with server.session(resume={"after_seq": 0}) as wire:
        (event,) = await events(wire, "conversation_created")
        assert (event["seq"], event["conversation"]) == (1, wire.answered["conversation"])


async def test_the_answer_publishes_limits_and_heartbeat(server):
    async with server.session() as wire:
        assert wire.answered["limits"]["calls"] == 64
        assert wire.answered["heartbeat_s"] == 20.0
        assert wire.answered["server"]["name"] == "agent-server"


async def test_nothing_is_answered_before_initialize(server):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        for method in ("conversation.state", "execute", "conversations.list"):
            error = (
                await wire.call(method, op_id=new_id(), shell="x")
                if method == "execute"
                else await wire.call(method)
            )
            assert error["error"]["data"]["kind"] == "not_initialised", method


async def test_a_ping_is_answered_before_initialize(server):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        assert (await wire.call("ping"))["result"] == {}


async def test_a_browser_shows_its_key_in_the_first_message(start):
    async with start(allow_origins=("https://console.example",)) as server, await server.wire() as wire:
        await wire.upgrade(None)
        assert (await wire.initialize(auth=KEY))["result"]["conversation"]


async def test_a_wrong_key_in_the_first_message_closes_with_4401(server):
    async with await server.wire() as wire:
        await wire.upgrade(None)
        assert (await wire.initialize(auth="wrong"))["error"]["data"]["kind"] == "unauthorized"
        assert (await wire.ended()).code == 4401


async def test_no_key_in_the_first_message_closes_with_4401(server):
    async with await server.wire() as wire:
        await wire.upgrade(None)
        assert (await wire.initialize())["error"]["code"] == -32003
        assert (await wire.ended()).code == 4401


async def test_too_many_wrong_keys_in_first_messages_close_with_4429(server):
    codes = []
    for _ in range(6):
        async with await server.wire() as wire:
            await wire.upgrade(None)
            await wire.initialize(auth="wrong")
            codes.append((await wire.ended()).code)
    assert codes == [4401] * 5 + [4429]


async def test_no_first_message_closes_with_4401(start):
    async with start(handshake_seconds=0.2) as server, await server.wire() as wire:
        await wire.upgrade(server.key)
        assert await wire.ended() == (4401, "no initialize within 0.2 s")


async def test_messages_that_are_no_initialize_do_not_gain_time(start):
    async with start(handshake_seconds=0.3) as server, await server.wire() as wire:
        await wire.upgrade(server.key)
        await wire.call("conversation.state")
        assert (await wire.ended()).code == 4401


@pytest.mark.parametrize("version", [99, 0, -1, "1", None])
async def test_another_version_is_refused_and_may_be_corrected(server, version):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        error = (await wire.initialize(protocol_version=version))["error"]
        assert error["code"] == -32602
        assert "$.params.protocol_version" in error["message"]
        assert "result" in await wire.initialize()


async def test_limits_with_which_nothing_could_be_sent_are_refused(server):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        error = (await wire.initialize(limits={"calls": 0}))["error"]
        assert "$.params.limits.calls" in error["message"]


async def test_an_unknown_conversation_closes_with_4404_when_the_key_came_late(server):
    async with await server.wire() as wire:
        await wire.upgrade(None, "/v1/conversations/nowhere")
        assert (await wire.initialize(auth=KEY))["error"]["data"]["kind"] == "conversation_not_found"
        assert (await wire.ended()).code == 4404


@pytest.mark.parametrize(
    ("workspace", "kind"),
    [
        ({"working_dir": "/no/such/folder"}, "path_not_found"),
        ({"working_dir": "relative"}, "invalid_params"),
        ({"working_dir": "/etc/hostname"}, "not_a_directory"),
        ({"share": "nobody"}, "conversation_not_found"),
        ({"sandbox": {"image": "x", "memory": "1k"}}, "invalid_params"),
        ({"share": "x", "working_dir": "/"}, "invalid_params"),
    ],
)
async def test_a_workspace_that_cannot_be_is_refused(server, workspace, kind):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        assert (await wire.initialize(workspace=workspace))["error"]["data"]["kind"] == kind


async def test_an_existing_conversation_has_its_workspace_already(server):
    async with server.session() as wire:
        path = f"/v1/conversations/{wire.answered['conversation']}"
    async with await server.wire() as wire:
        await wire.upgrade(server.key, path)
        assert (await wire.initialize(workspace={}))["error"]["code"] == -32602


# --- events ---


async def test_the_events_of_a_turn_come_once_each_and_in_order(server):
    async with server.session(resume={"after_seq": 0}) as wire:
        await wire.send(frame(TEXT, call("conversation.configure", 1, op_id=new_id(), agent=agent())))
        await wire.send(frame(TEXT, call("send_message", 2, op_id=new_id(), text="hi")))
        seen = await events(wire, "turn_ended")
        assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
        assert [event["type"] for event in seen if event["type"] == "agent_message"] == ["agent_message"]


async def test_an_id_that_the_client_chose_leads_to_one_conversation_however_often_it_is_asked_for(server):
    chosen = new_id()
    async with server.session(conversation=chosen) as first, server.session(conversation=chosen) as again:
        assert first.answered["conversation"] == again.answered["conversation"] == chosen
        assert len((await again.call("conversations.list", 1))["result"]) == 1


async def test_a_chosen_id_is_refused_where_it_makes_no_sense(server, tmp_path):
    chosen = new_id()
    async with (
        server.session(conversation=chosen),
        await server.wire() as other,
        await server.wire() as third,
    ):
        await other.upgrade(server.key)
        refused = await other.initialize(conversation=chosen, workspace={"working_dir": str(tmp_path)})
        assert refused["error"]["data"]["kind"] == "op_mismatch"
        assert (await other.initialize(conversation="../it"))["error"]["code"] == -32602
        await third.upgrade(server.key, f"/v1/conversations/{chosen}")
        assert "has its id already" in (await third.initialize(conversation=chosen))["error"]["message"]


async def test_a_client_that_comes_back_gets_exactly_what_it_missed(server):
    async with server.session(resume={"after_seq": 0}) as wire:
        id = wire.answered["conversation"]
        (created,) = await events(wire, "conversation_created")
    async with server.session(f"/v1/conversations/{id}") as other:
        await configure(other)
        await other.call("send_message", op_id=new_id(), text="hi")
    async with server.session(f"/v1/conversations/{id}", resume={"after_seq": created["seq"]}) as wire:
        missed = await events(wire, "turn_ended")
        assert [event["seq"] for event in missed] == list(range(2, 2 + len(missed)))


async def test_a_subscription_may_come_later_but_only_once(server):
    async with server.session() as wire:
        answer = await wire.call("events.subscribe", 1, after_seq=0)
        result = answer["result"]
        assert (result["epoch"], result["head_seq"]) == (wire.answered["epoch"], 1)
        assert result["state"] == wire.answered["state"]
        assert (result["state"]["state"], result["state"]["head_seq"]) == ("idle", 1)
        assert (await events(wire, "conversation_created"))[0]["seq"] == 1
        assert (await wire.call("events.subscribe", 2))["error"]["code"] == -32600


async def test_replay_and_live_meet_without_gap_or_repetition(server):
    """Titles are written while another connection replays what was written before."""
    async with server.session() as writer:
        id = writer.answered["conversation"]
        await titles(writer, 0, 300)
        async with server.session(f"/v1/conversations/{id}", resume={"after_seq": 0}) as reader:
            writing = asyncio.create_task(titles(writer, 300, 600))
            seqs: list[int] = []
            while len(seqs) < 601:
                message = await reader.message()
                seqs += [event["seq"] for event in message["params"]["events"]]
            assert seqs == list(range(1, 602))
            await writing


async def titles(wire, first: int, last: int) -> None:
    for number in range(first, last):
        await wire.call("set_title", number, op_id=new_id(), title=f"title {number}")


async def test_who_does_not_read_is_cut_off_and_the_others_are_not(start):
    limits = {"queue_bytes": 1 << 20}
    async with start(limits=msgspec.convert(limits, _limits())) as server, server.session() as writer:
        id = writer.answered["conversation"]
        path = f"/v1/conversations/{id}"
        async with (
            server.session(path, resume={"after_seq": 0}),  # it never reads again
            server.session(path, resume={"after_seq": 0}) as healthy,
        ):
            counting = asyncio.create_task(count_events(healthy, 61))
            for number in range(60):
                text = f"{number}" + "x" * 100_000
                await writer.call("set_title", number, op_id=new_id(), tags={str(number): text})
            assert await counting == list(range(1, 62))
            assert await gone(server, "slow_readers_total 1.0")


def _limits():
    from agent_sdk.protocol.specs import Limits  # noqa: PLC0415

    return Limits


async def count_events(wire, number: int) -> list[int]:
    seqs: list[int] = []
    while len(seqs) < number:
        message = await whole_message(wire)
        if message.get("method") == "events":
            seqs += [event["seq"] for event in message["params"]["events"]]
    return seqs


async def whole_message(wire) -> dict:
    """The next message, be it in pieces."""
    pieces = b""
    while True:
        opcode, payload = await wire.frame()
        assert opcode != CLOSE
        if opcode == TEXT:
            return msgspec.json.decode(payload)
        pieces += payload[16:]
        if int.from_bytes(payload[2:4], "big") & 1:
            return msgspec.json.decode(pieces)


async def gone(server, line: str) -> bool:
    async with asyncio.timeout(GUARD), server.http() as http:
        while True:
            async with http.get("/metrics") as answer:
                if line in await answer.text():
                    return True


# --- tools of the client ---

TOOL = {
    "name": "price",
    "description": "Price of a stock.",
    "parameters": {"type": "object", "properties": {}},
}
BUYER = agent(
    {"step": "call", "tool": "price", "arguments": {"of": "X"}},
    {"step": "say", "text": "bought"},
    client_tools=[TOOL],
)


async def tool_call(wire) -> dict:
    """The server's next call of a tool."""
    while (message := await wire.message()).get("method") != "tool.call":
        pass
    return message


async def test_a_tool_call_outlives_the_connection_that_had_it(server):
    async with server.session() as first:
        path = f"/v1/conversations/{first.answered['conversation']}"
        await first.call("conversation.configure", op_id=new_id(), agent=BUYER)
        await first.send(frame(TEXT, call("send_message", 2, op_id=new_id(), text="buy")))
        asked = await tool_call(first)
    async with server.session(path) as second:
        assert (await second.call("conversation.state", 1))["result"]["state"] == "awaiting"
        await second.call("events.subscribe", 2, after_seq=second.answered["head_seq"])
        await second.send(frame(TEXT, call("tools.register", 3, tools=["price"])))
        again = await tool_call(second)
        assert again["params"] == asked["params"]
        await second.send_json({"jsonrpc": "2.0", "id": again["id"], "result": {"text": "5 EUR"}})
        *_, ended = await events(second, "turn_ended")
        assert (ended["status"], ended["final_text"]) == ("finished", "bought")


# --- the end ---


async def test_a_deleted_conversation_is_gone_for_everybody(server):
    async with server.session() as wire:
        path = f"/v1/conversations/{wire.answered['conversation']}"
        async with server.session(path) as other:
            root = Path((await wire.call("workspace.describe", 1))["result"]["root"])
            assert (await wire.call("conversation.delete", 2, op_id=new_id()))["result"] == {}
            assert (await other.ended()).code == 4404
        assert not root.exists()
        assert await gone(server, "agent_server_boxes 0.0")
    async with await server.wire() as wire:
        answer = await wire.ask(_upgrade(path))
        assert answer.status == 404


def _upgrade(path: str) -> bytes:
    from tests.server.wire import upgrade  # noqa: PLC0415

    return upgrade(KEY, path=path)


async def test_conversations_are_listed_newest_first_with_what_they_are_called(server):
    async with server.session() as first, server.session() as second:
        await first.call("set_title", 1, op_id=new_id(), title="one", tags={"a": "b"})
        listed = (await second.call("conversations.list", 2))["result"]
        assert [entry["id"] for entry in listed] == [
            second.answered["conversation"],
            first.answered["conversation"],
        ]
        assert (listed[1]["title"], listed[1]["tags"]) == ("one", {"a": "b"})


async def test_an_idle_conversation_leaves_memory_and_comes_back_as_it_was(start):
    async with start(idle_seconds=0.0) as server:
        async with server.session() as wire:
            id = wire.answered["conversation"]
            await wire.call("set_title", op_id=new_id(), title="kept")
        assert await gone(server, "agent_server_conversations 0.0")
        async with server.http() as http, http.get("/v1/conversations") as answer:
            assert (await answer.json())[0]["title"] == "kept"
        async with server.session(f"/v1/conversations/{id}") as wire:
            assert (await wire.call("conversation.state"))["result"]["title"] == "kept"


async def test_a_server_that_starts_again_knows_its_conversations(start):
    async with start() as server, server.session() as wire:
        id, epoch = wire.answered["conversation"], wire.answered["epoch"]
        await wire.call("set_title", op_id=new_id(), title="kept")
    async with start() as server, server.session(f"/v1/conversations/{id}") as wire:
        assert (wire.answered["epoch"], wire.answered["head_seq"]) == (epoch, 2)


async def test_secrets_and_keys_of_models_are_in_no_log_line(start):
    async with start() as server:
        async with server.session() as wire:
            llm = {"kind": "llm", "model": "openai/x", "api_key": "sk-canary-0123456789"}
            await wire.call(
                "conversation.configure",
                op_id=new_id(),
                agent={"llm": llm},
                secrets={"TOKEN": "canary-abcdefgh"},
            )
            server_log = server.log
            await wire.call(
                "conversation.configure",
                2,
                op_id=new_id(),
                agent={"llm": llm, "tools": ["sk-canary-0123456789"]},
            )
        assert "canary" not in server_log.getvalue()
