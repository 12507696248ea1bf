"""A conversation whose log is damaged in its middle, on a server: said, never served, and it can be deleted."""

from __future__ import annotations

from contextlib import closing

import apsw
import pytest

from agent_sdk.ids import new_id
from agent_server.data_folder import DataFolder


def damage(folder, conversation: str) -> None:
    """Change one letter of the first event."""
    with closing(apsw.Connection(str(DataFolder(folder).log))) as connection:
        [(key,)] = connection.execute("SELECT key FROM conversations WHERE id = ?", (conversation,))
        connection.execute(
            "UPDATE events SET body = CAST(replace(body, 'version', 'varsion') AS BLOB) WHERE id = ?",
            (key << 36 | 1,),
        )


async def rpc(http, method: str, conversation: str, **params):
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with http.post("/v1/rpc", params={"conversation": conversation}, json=body) as answer:
        return await answer.json()


@pytest.fixture
async def damaged(start, tmp_path):
    """A damaged conversation beside a whole one; both ids."""
    async with start() as server, server.session() as one, server.session() as other:
        for wire in (one, other):
            await wire.call("set_title", 1, op_id=new_id(), title="mine")
            await wire.call("set_title", 2, op_id=new_id(), title="ours")
        ids = one.answered["conversation"], other.answered["conversation"]
    damage(tmp_path / "data", ids[0])
    return ids


async def test_it_is_listed_as_damaged_and_nothing_of_it_is_served(start, damaged):
    broken, whole = damaged
    async with start() as server, server.http() as http:
        refused = await rpc(http, "conversation.events", broken)
        assert refused["error"]["data"]["kind"] == "conversation_damaged"
        async with http.get("/v1/conversations") as answer:
            states = {each["id"]: each["state"] for each in await answer.json()}
        assert states == {broken: "damaged", whole: "idle"}
        assert (await rpc(http, "conversation.state", whole))["result"]["title"] == "ours"


async def test_it_can_be_deleted(start, damaged):
    broken, whole = damaged
    async with start() as server, server.http() as http:
        assert "result" in await rpc(http, "conversation.delete", broken, op_id=new_id())
        async with http.get("/v1/conversations") as answer:
            assert [each["id"] for each in await answer.json()] == [whole]
