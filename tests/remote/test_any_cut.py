"""A session whose connection is cut at any byte is seen by its user as if nothing had happened."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from agent_sdk import Agent, ConfirmationPolicy, Conversation, RemoteWorkspace, tool
from agent_sdk.protocol.events import Event, RequestOpened, Waiting, kind_of
from agent_sdk.testing import ScriptedLLM, call, say
from tests.chaos.proxy import Direction, Proxy
from tests.remote.conftest import place_of

STEP = 97
PARTS = 8
"""Tests that share the cuts, so that they run side by side."""
TOLD = ("text", "tool", "arguments", "is_error", "answer", "status", "final_text", "names", "title")


class Seen(NamedTuple):
    """All that a user of the session could tell."""

    events: tuple[tuple, ...]
    asked: tuple[str, ...]
    said: str
    results: tuple


async def session(server, proxy: Proxy, folder: Path) -> Seen:
    """A conversation with everything in it."""
    asked: list[str] = []
    events: list[tuple] = []
    heard: list[bytes] = []

    @tool
    async def ask_me(question: str) -> str:
        """Ask the user."""
        asked.append(question)
        return f"{question} is answered"

    async def see(event: Event) -> None:
        assert conversation.cursor.seq == event.seq
        if isinstance(event, Waiting):  # a box that takes more than a second to start is told of
            return
        facts = {name: getattr(event, name) for name in TOLD if hasattr(event, name)}
        events.append((kind_of(event), str(facts).replace(conversation.id, "ID")))
        if isinstance(event, RequestOpened) and event.request == "approval":
            await conversation.respond(event.request_id, "approve")

    steps = [call("terminal", command="echo one >> runs; wc -l < runs"), call("ask_me", question="why")]
    agent = Agent(llm=ScriptedLLM([*steps, say("done")]), tools=["terminal", ask_me])
    (folder / "here").write_bytes(b"content " * 100)
    url = f"http://127.0.0.1:{proxy.port}"
    async with RemoteWorkspace(url, server.api_key) as workspace:
        conversation = Conversation(
            agent,
            workspace,
            callbacks=[see],
            confirmation=ConfirmationPolicy(mode="always"),
            title="a session",
        )
        await conversation.send_message("go")
        outcome = await conversation.run()
        sent = await workspace.upload(folder / "here", "there")
        got = await workspace.download("there", folder / "back")
        told = await workspace.execute(
            "echo one >> ran; seq 40; wc -l < ran", on_output=lambda _, data: heard.append(data)
        )
        results = (outcome.status, outcome.final_text, sent, got, told.status, told.exit_code, told.stdout)
        await conversation.delete()
    assert (folder / "back").read_bytes() == (folder / "here").read_bytes()
    return Seen(tuple(events), tuple(asked), b"".join(heard).decode(), results)


async def cut_after(server, way: Direction, size: int, folder: Path) -> tuple[Seen, int]:
    """The session cut after so many bytes; how many connections it took is the second."""
    folder.mkdir()
    async with Proxy(place_of(server)) as proxy:
        proxy.cuts.append((way, size))
        return await session(server, proxy, folder), proxy.connections


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_session_cut_at_any_byte_is_seen_alike(
    running_server, tmp_path, way: Literal["up", "down"], part
):
    async with Proxy(place_of(running_server)) as proxy:
        whole = await session(running_server, proxy, tmp_path)
        total = proxy.passed[way]
    assert whole.said.endswith("40\n1\n")
    sizes = range(1 + part * STEP, total, STEP * PARTS)
    turn = asyncio.Semaphore(3)

    async def one(size: int) -> None:
        async with turn:
            seen, connections = await cut_after(running_server, way, size, tmp_path / str(size))
        assert seen == whole, size
        assert connections > 1 or size > total - STEP * PARTS, size

    async with asyncio.TaskGroup() as group:
        for size in sizes:
            group.create_task(one(size))
