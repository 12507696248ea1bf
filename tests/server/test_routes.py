"""Plain HTTP: the same calls and events for curl, proxies and dashboards."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace

import aiohttp
import pytest

from agent_sdk import AgentServer, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ConversationNotFound, InvalidParams, StateConflict, Unauthorized
from agent_sdk.protocol.methods import all_methods
from agent_server.app import Routes
from agent_server.http.security import OPEN_PATHS
from tests.server.conftest import KEY
from tests.server.wire import GUARD, call

ROUTES = [name for name in vars(Routes) if not name.startswith("_")]
CLIENT = {"name": "curl", "version": "8"}
ORIGIN = "https://console.example"


async def rpc(http: aiohttp.ClientSession, method: str, conversation: str | None = None, **params) -> dict:
    query = {"conversation": conversation} if conversation else {}
    async with http.post("/v1/rpc", params=query, data=call(method, **params)) as answer:
        assert answer.status == 200
        return await answer.json()


async def made(http: aiohttp.ClientSession) -> str:
    """The id of a fresh conversation."""
    answer = await rpc(http, "initialize", protocol_version=1, client=CLIENT)
    return answer["result"]["conversation"]


async def status(http: aiohttp.ClientSession, method: str, path: str, **options) -> tuple[int, str]:
    async with http.request(method, path, **options) as answer:
        content = await answer.json(content_type=None)
        kind = content.get("error", {}).get("data", {}).get("kind", "") if isinstance(content, dict) else ""
        return answer.status, kind


async def test_every_route_but_two_needs_the_key(server):
    """Walks the real table, so that a new route cannot be forgotten."""
    routes = Routes.table(SimpleNamespace(**dict.fromkeys(ROUTES)))
    assert len(routes) >= 8
    async with server.http(key=None) as http:
        for route in routes:
            expected = (200, "") if route.path in OPEN_PATHS else (401, "unauthorized")
            assert await status(http, route.method, route.path.replace("{id}", "some")) == expected


async def test_unknown_paths_need_the_key_too(server):
    async with server.http(key=None) as http:
        assert await status(http, "GET", "/nowhere") == (401, "unauthorized")
    async with server.http() as http:
        assert await status(http, "GET", "/nowhere") == (404, "not_found")
        assert await status(http, "DELETE", "/v1/rpc") == (405, "method_not_allowed")


async def test_health_says_nothing_but_that_it_lives(server):
    async with server.http(key=None) as http, http.get("/health") as answer:
        assert await answer.json() == {"status": "ok"}
        assert answer.headers["Server"] == "agent-server"
        assert answer.headers["Cache-Control"] == "no-store"


async def test_ready_says_when_the_server_stops(server):
    async with server.http() as http, http.get("/ready") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ready"})


async def test_metrics_are_in_the_format_of_prometheus(server):
    async with server.session() as wire, server.http() as http:
        await wire.call("conversation.state")
        async with http.get("/metrics") as answer:
            page = await answer.text()
        assert "agent_server_sessions 1.0\n" in page
        assert 'agent_server_calls_total{method="conversation.state",outcome="ok"} 1.0\n' in page


async def test_the_methods_describe_themselves(server):
    async with server.http() as http, http.get("/openrpc.json") as answer:
        document = await answer.json()
    assert {method["name"] for method in document["methods"]} >= set(all_methods()) - {"tool.call"}


async def test_a_listed_web_page_may_ask(start):
    async with start(allow_origins=(ORIGIN,)) as server, server.http(key=None) as http:
        async with http.options("/v1/rpc", headers={"Origin": ORIGIN}) as preflight:
            assert preflight.status == 204
            allowed = preflight.headers["Access-Control-Allow-Headers"]
            assert {"Authorization", "X-API-Key", "Last-Event-ID"} <= set(allowed.split(", "))
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {KEY}"}
        async with http.get("/v1/conversations", headers=headers) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert await status(http, "OPTIONS", "/v1/rpc", headers={"Origin": "https://evil"}) == (
            403,
            "origin_not_allowed",
        )


# --- POST /v1/rpc ---


async def test_a_conversation_can_be_led_with_curl(server):
    async with server.http() as http:
        id = await made(http)
        agent = {"llm": {"kind": "scripted", "steps": [{"step": "say", "text": "hello"}]}, "tools": []}
        await rpc(http, "conversation.configure", id, op_id=new_id(), agent=agent)
        accepted = await rpc(http, "send_message", id, op_id=new_id(), text="hi")
        assert accepted["result"]["seq"] == 3
        text = await streamed(http, id, "turn_ended")
        assert '"final_text":"hello"' in text


async def streamed(http: aiohttp.ClientSession, id: str, until: str, **headers: str) -> str:
    """The event stream up to a type of event."""
    text = ""
    async with (
        asyncio.timeout(GUARD),
        http.get(
            f"/v1/conversations/{id}/events", headers={"Accept": "text/event-stream", **headers}
        ) as answer,
    ):
        assert answer.content_type == "text/event-stream"
        async for line in answer.content:
            text += line.decode()
            if f'"type":"{until}"' in text:
                return text
    return text


async def test_commands_run_over_http_and_answer_with_text(server):
    async with server.http() as http:
        id = await made(http)
        answer = await rpc(http, "execute", id, op_id=new_id(), shell="echo out; echo err >&2; exit 3")
        result = answer["result"]
        assert (result["exit_code"], result["stdout_text"], result["stderr_text"]) == (3, "out\n", "err\n")


async def test_what_moves_bytes_needs_a_websocket(server):
    async with server.http() as http:
        id = await made(http)
        answer = await rpc(http, "upload", id, op_id=new_id(), path="x", channel=1)
        assert answer["error"]["code"] == -32602
        assert "needs a WebSocket" in answer["error"]["message"]
        answer = await rpc(http, "tools.register", id, tools=["x"])
        assert "needs a WebSocket" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "conversation", "code"),
    [
        ("conversation.state", None, -32602),
        ("conversation.state", "nowhere", -32004),
        ("conversations.list", None, None),
        ("ping", None, None),
        ("no.such", "new", -32601),
        ("no.such", None, -32602),
        ("events.subscribe", "new", -32601),
    ],
)
async def test_which_calls_need_to_name_a_conversation(server, method, conversation, code):
    async with server.http() as http:
        if conversation == "new":
            conversation = await made(http)
        assert (await rpc(http, method, conversation)).get("error", {}).get("code") == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"[]", -32600),
        (b'{"jsonrpc":"2.0","method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"result":1}', -32600),
        (b"[" * 100_000, -32700),
        (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', -32600),
    ],
)
async def test_a_body_that_is_no_call_gets_a_json_rpc_error(server, body, code):
    async with server.http() as http, http.post("/v1/rpc", data=body) as answer:
        content = await answer.json()
        assert (answer.status, content["id"], content["error"]["code"]) == (200, None, code)


async def test_an_op_id_counts_on_http_and_websocket_alike(server):
    op_id = new_id()
    async with server.session() as wire, server.http() as http:
        id = wire.answered["conversation"]
        given = {"op_id": op_id, "shell": "echo x >> runs; cat runs"}
        first = (await rpc(http, "execute", id, **given))["result"]
        second = (await wire.call("execute", **given))["result"]
        assert first["stdout_text"] == second["stdout_text"] == "x\n"


# --- the list ---


async def test_conversations_are_listed_in_pages_and_by_tag_and_state(server):
    made = []
    async with server.http() as http:
        for nth in range(5):
            async with server.session() as wire:
                made.append(wire.answered["conversation"])
                await wire.call("set_title", op_id=new_id(), title="t", tags={"n": str(nth % 2), "t": "x=y"})

        async def listed(**query):
            async with http.get("/v1/conversations", params=query) as answer:
                return [each["id"] for each in await answer.json()]

        newest = made[::-1]
        assert await listed() == newest
        assert await listed(limit="2") == newest[:2]
        assert await listed(limit="2", before=newest[1]) == newest[2:4]
        assert await listed(before=newest[4]) == []
        assert await listed(tag="n=1") == [made[3], made[1]]
        assert await listed(tag="t=x=y", limit="1", state="idle", before=newest[0]) == [newest[1]]
        assert await listed(state="running") == []
        await AgentServer(server.url, KEY).delete(newest[1])
        assert await listed(limit="2", before=newest[1]) == newest[2:4], "the cursor may be gone"


QUERIES = {
    "/v1/conversations?state=odd": "?state: expected one of idle, running, awaiting, paused, failed, closed, "
    "damaged, got 'odd'",
    "/v1/conversations?state=": "?state: expected one of idle",
    "/v1/conversations?limit=0": "?limit: expected int 1..1000, got '0'",
    "/v1/conversations?before=zz": "?before: expected the id of a conversation, got 'zz'",
    "/v1/conversations?tag=team": "?tag: expected NAME=VALUE with another NAME each time, got 'team'",
    "/v1/conversations?tag==red": "?tag: expected NAME=VALUE",
    "/v1/conversations?tag=a=1&tag=a=2": "?tag: expected NAME=VALUE with another NAME each time, got 'a=2'",
    "/v1/conversations?state=idle&state=running": "?state: it is given more than once; leave one",
    "/v1/conversations?nope=1": "?nope: there is no such parameter; /v1/conversations takes limit, before, state, tag",
}


@pytest.mark.parametrize(("address", "sentence"), QUERIES.items(), ids=QUERIES)
async def test_a_query_that_makes_no_sense_is_told_in_a_sentence(server, address, sentence):
    async with server.http() as http, http.get(address) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["data"]["kind"]) == (400, "invalid_params")
        assert error["message"].startswith(sentence)


async def test_no_address_overlooks_what_it_does_not_know(server):
    """Walks the real table, so that a new route cannot be forgotten."""
    async with server.http() as http:
        id = await made(http)
        for route in Routes.table(SimpleNamespace(**dict.fromkeys(ROUTES))):
            address = route.path.replace("{id}", id)
            assert await status(http, route.method, f"{address}?nope=1") == (400, "invalid_params"), address
        assert await status(http, "GET", "/nowhere?nope=1") == (404, "not_found")
        assert await status(http, "POST", f"/v1/rpc?conversation={id}&conversation={id}") == (
            400,
            "invalid_params",
        )
        answer = await rpc(http, "conversations.list", before="zz")
        assert answer["error"]["code"] == -32602


async def test_who_asks_so_removes_no_conversation_whose_turn_runs_or_waits(server):
    manager = AgentServer(server.url, KEY)
    async with server.http() as http:
        id = await made(http)
        agent = {"llm": {"kind": "scripted", "steps": [{"step": "hang"}]}, "tools": []}
        await rpc(http, "conversation.configure", id, op_id=new_id(), agent=agent)
        await rpc(http, "send_message", id, op_id=new_id(), text="hi")
        with pytest.raises(StateConflict, match="the conversation is running") as refused:
            await manager.delete(id, unless_busy=True)
        assert refused.value.details["state"] == "running"
        assert [each.id for each in await manager.conversations()] == [id]
        await rpc(http, "interrupt", id, op_id=new_id())
        await manager.delete(id, unless_busy=True)
        assert await manager.conversations() == []


async def test_a_server_can_be_looked_after_from_python(server):
    async with server.session() as wire:
        await wire.call("set_title", op_id=new_id(), title="mine", tags={"team": "red & blue"})
        id = wire.answered["conversation"]
    manager = AgentServer(server.url, KEY)
    assert [each.title for each in await manager.conversations(tags={"team": "red & blue"}, limit=1)] == [
        "mine"
    ]
    assert await manager.conversations(before=id) == []
    await manager.delete(id)
    assert await manager.conversations() == []
    with pytest.raises(ConversationNotFound):
        await manager.delete(id)
    with pytest.raises(InvalidParams):
        await manager.conversations(limit=0)
    with pytest.raises(Unauthorized):
        await AgentServer(server.url, "wrong").conversations()


async def test_what_was_only_looked_at_leaves_no_conversation(server):
    manager = AgentServer(server.url, KEY)
    async with RemoteWorkspace(server.url, KEY) as looked_at:
        assert (await looked_at.execute("ls")).exit_code == 0
        await looked_at.files.list()
        looking = await manager.conversations()
        assert [each.id for each in looking] == [looked_at.conversation]
    await server.log.until("conversation_deleted")
    assert await manager.conversations() == []
    kept = []
    async with RemoteWorkspace(server.url, KEY) as used:
        await used.execute("touch it")
        kept.append(used.conversation)
    async with RemoteWorkspace(server.url, KEY) as busy:
        await busy.start("sleep 600")
        kept.append(busy.conversation)
    async with RemoteWorkspace(server.url, KEY, conversation=kept[0]) as again:
        assert [info.path for info in await again.files.list()] == ["it"]
    async with RemoteWorkspace(server.url, KEY) as last:
        kept.append(last.conversation)
        assert len(await manager.conversations()) == 3
    await server.log.until("conversation_deleted", 2)
    assert [each.id for each in await manager.conversations()] == kept[1::-1]


async def test_with_retention_a_server_removes_what_nobody_used_for_long(start):
    async with start() as server, server.session() as wire:
        await wire.call("execute", op_id=new_id(), shell="echo kept > file")
        await wire.call("set_title", op_id=new_id(), title="kept")
    async with start(retention="1d") as server:
        assert len(await AgentServer(server.url, KEY).conversations()) == 1
    async with start(retention="0s") as server:
        await server.log.until("conversation_deleted")
        assert await AgentServer(server.url, KEY).conversations() == []


# --- events ---


async def test_events_come_in_pages(server):
    async with server.session() as wire, server.http() as http:
        id = wire.answered["conversation"]
        for number in range(5):
            await wire.call("set_title", number, op_id=new_id(), title=str(number))
        async with http.get(f"/v1/conversations/{id}/events", params={"after": "2", "limit": "3"}) as answer:
            page = await answer.json()
        assert [event["seq"] for event in page["events"]] == [3, 4, 5]
        assert (page["head_seq"], page["epoch"]) == (6, wire.answered["epoch"])


@pytest.mark.parametrize(
    "query",
    [
        "after=-1",
        "after=x",
        "after=",
        "after=1&after=2",
        f"after={2**64}",
        "limit=0",
        "limit=1001",
        "after=%D9%A1",
    ],
)
async def test_a_cursor_that_is_no_number_is_refused(server, query):
    async with server.http() as http:
        id = await made(http)
        assert await status(http, "GET", f"/v1/conversations/{id}/events?{query}") == (400, "invalid_params")


async def test_events_of_an_unknown_conversation_are_not_found(server):
    async with server.http() as http:
        assert await status(http, "GET", "/v1/conversations/nowhere/events") == (
            404,
            "conversation_not_found",
        )


async def test_an_event_stream_resumes_after_the_last_event_id(server):
    async with server.session() as wire, server.http() as http:
        id = wire.answered["conversation"]
        for number in range(3):
            await wire.call("set_title", number, op_id=new_id(), title=f"t{number}")
        text = await streamed(http, id, "title_changed", **{"Last-Event-ID": "3"})
        assert [line for line in text.splitlines() if line.startswith("id:")] == ["id: 4"]


async def test_an_event_stream_goes_on_with_live_events(server):
    async with server.session() as wire, server.http() as http:
        id = wire.answered["conversation"]
        async with (
            asyncio.timeout(GUARD),
            http.get(f"/v1/conversations/{id}/events", headers={"Accept": "text/event-stream"}) as answer,
        ):
            while b"conversation_created" not in await answer.content.readline():
                pass
            await wire.call("set_title", op_id=new_id(), title="live")
            while b'"title":"live"' not in await answer.content.readline():
                pass


async def test_a_stream_from_the_future_begins_with_a_reset(server):
    async with server.http() as http:
        id = await made(http)
        text = await streamed(http, id, "conversation_created", **{"Last-Event-ID": "99"})
        assert text.index("event: sync.reset") < text.index("id: 1")


async def test_a_stream_ends_well_formed_when_its_conversation_is_deleted(server):
    async with server.session() as wire, server.http() as http:
        id = wire.answered["conversation"]
        url, headers = f"/v1/conversations/{id}/events", {"Accept": "text/event-stream"}
        async with asyncio.timeout(GUARD), http.get(url, headers=headers) as answer:
            while b"conversation_created" not in await answer.content.readline():
                pass
            await wire.call("conversation.delete", op_id=new_id())
            assert b"HTTP/1.1" not in await answer.content.read()
        assert (await http.get(url, headers=headers)).status == 404


async def test_a_stream_ends_when_the_server_does(start):
    async with AsyncExitStack() as client, asyncio.timeout(GUARD):
        async with start() as server:
            http = await client.enter_async_context(server.http())
            id = await made(http)
            url, headers = f"/v1/conversations/{id}/events", {"Accept": "text/event-stream"}
            answer = await client.enter_async_context(http.get(url, headers=headers))
            while b"conversation_created" not in await answer.content.readline():
                pass
        assert await answer.content.read() == b"\n"
