"""Where a client's history goes on, and what happens when it cannot."""

from __future__ import annotations

import asyncio
import shutil

import msgspec
import pytest
from msgspec import Raw

from agent_sdk import Agent, Conversation, Cursor, RemoteWorkspace
from agent_sdk.protocol.errors import HistoryLost, InvalidParams, Unauthorized
from agent_sdk.protocol.methods.connection import SyncReset
from agent_sdk.testing import ScriptedLLM, say
from tests.chaos.server import KEY, Server

TWO = Agent(llm=ScriptedLLM([say("one"), say("two")]))


@pytest.fixture
async def workspace(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        yield workspace


class Diary:
    """What a callback made of the events, and the cursor it stored with it."""

    def __init__(self) -> None:
        self.moved = asyncio.Event()
        self.seqs: list[int] = []
        self.resets: list[Cursor] = []
        self.cursor = Cursor("", 0)
        self.conversation = None

    def see(self, event) -> None:
        self.seqs.append(event.seq)
        self.cursor = self.conversation.cursor

        self.moved.set()

    async def reached(self, seq: int) -> None:
        while seq not in self.seqs:
            self.moved.clear()
            await self.moved.wait()

    def begin_anew(self, start: Cursor) -> None:
        self.resets.append(start)
        self.seqs.clear()

    def attach(self, agent, workspace, *, resets=True, **options):
        on_reset = self.begin_anew if resets else None
        self.conversation = Conversation(agent, workspace, callbacks=[self.see], on_reset=on_reset, **options)
        return self.conversation


async def talk(workspace, messages: int = 1) -> Diary:
    """A conversation with some turns, seen from its beginning."""
    diary = Diary()
    conversation = diary.attach(TWO, workspace)
    for _ in range(messages):
        await conversation.send_message("go")
        await conversation.run()
    return diary


async def test_a_cursor_that_a_callback_stored_goes_on_where_it_stopped(running_server, workspace):
    diary = await talk(workspace)
    seen = list(diary.seqs)
    assert diary.cursor.seq == seen[-1]
    await diary.conversation.close()
    async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
        again = diary.attach(None, other, id=diary.conversation.id, since=diary.cursor)
        await again.send_message("more")
        assert (await again.run()).final_text == "two"
        assert diary.seqs == list(range(1, (await again.state()).head_seq + 1))
        assert diary.resets == []


async def test_events_after_a_seq_are_given_to_callbacks_although_nothing_new_happens(
    running_server, workspace
):
    first = await talk(workspace)
    async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
        diary = Diary()
        again = diary.attach(None, other, id=first.conversation.id, since=2)
        assert (await again.run()).final_text == "one"
        assert diary.seqs == first.seqs[2:]


@pytest.mark.parametrize("epoch", ["its own", "not named"])
async def test_a_conversation_that_runs_here_goes_on_at_a_cursor_too(tmp_path, epoch):
    diary = Diary()
    async with diary.attach(TWO, tmp_path, id="here", persistence_dir=tmp_path / "log") as conversation:
        await conversation.send_message("go")
        await conversation.run()
    since = diary.cursor if epoch == "its own" else diary.cursor.seq
    async with diary.attach(
        TWO, tmp_path, id="here", persistence_dir=tmp_path / "log", since=since
    ) as conversation:
        await conversation.send_message("more")
        assert (await conversation.run()).final_text == "two"
        assert diary.seqs == list(range(1, (await conversation.state()).head_seq + 1))


@pytest.mark.parametrize("wrong", ["another epoch", "a seq that is not there yet"])
async def test_a_cursor_of_another_history_is_told_at_every_wait(running_server, workspace, wrong):
    first = await talk(workspace)
    cursor = Cursor("e" * 8, 1) if wrong == "another epoch" else Cursor(first.cursor.epoch, 1000)
    async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
        lost = Diary().attach(None, other, id=first.conversation.id, since=cursor, resets=False)
        for _ in range(2):
            with pytest.raises(HistoryLost, match="history"):
                await lost.run()
            with pytest.raises(HistoryLost):
                [event async for event in lost.events(1, follow=True)]


async def test_who_can_begin_anew_is_told_where_and_gets_all_events(running_server, workspace):
    first = await talk(workspace)
    async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
        diary = Diary()
        again = diary.attach(None, other, id=first.conversation.id, since=Cursor("another", 3))
        assert (await again.run()).final_text == "one"
        assert (diary.resets, diary.seqs) == ([Cursor(first.cursor.epoch, 0)], first.seqs)
        assert diary.cursor == first.cursor


async def test_a_history_that_begins_nowhere_is_refused_where_it_comes(workspace):
    conversation = Diary().attach(TWO, workspace)
    nowhere = Raw(msgspec.json.encode(SyncReset(reason="made anew", epoch="e", from_seq=0)))
    with pytest.raises(InvalidParams, match="seq: expected int >= 0, got -1"):
        conversation.noticed(SyncReset.method, nowhere)


async def test_reading_events_after_a_cursor_of_another_history_is_refused(workspace):
    first = await talk(workspace)
    with pytest.raises(HistoryLost):
        [event async for event in first.conversation.events(Cursor("another", 3))]
    after = [event.seq async for event in first.conversation.events(Cursor(first.cursor.epoch, 3))]
    assert after == first.seqs[3:]


@pytest.mark.parametrize("since", [-1, 2**63])
async def test_a_seq_that_is_none_is_refused_with_one_sentence(running_server, workspace, since):
    first = await talk(workspace)
    async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
        with pytest.raises(InvalidParams, match="since: expected Cursor or the seq of an event, 0 or more"):
            await Diary().attach(None, other, id=first.conversation.id, since=since).state()


# --- while it is connected ---


@pytest.mark.parametrize("resets", [False, True])
async def test_a_log_that_is_restored_from_a_backup_is_another_history(tmp_path, resets):
    async with Server(tmp_path) as server:
        await server.start()
        url = f"http://127.0.0.1:{server.port}"
        async with RemoteWorkspace(url, KEY) as workspace:
            diary = Diary()
            conversation = diary.attach(TWO, workspace, resets=resets)
            await conversation.send_message("go")
            await conversation.run()
            kept = list(diary.seqs)
            await server.stop()
            shutil.copytree(server.data, tmp_path / "backup")
            await server.start()
            await conversation.set_title("later")
            await diary.reached((await conversation.state()).head_seq)
            await server.stop()
            shutil.rmtree(server.data)
            shutil.copytree(tmp_path / "backup", server.data)
            await server.start()
            if resets:
                assert (await conversation.run()).final_text == "one"
                assert (len(diary.resets), diary.seqs) == (1, kept)
            else:
                with pytest.raises(HistoryLost, match=f"ends at {kept[-1]}"):
                    while True:
                        await conversation.run()


async def test_a_key_that_is_not_accepted_any_more_ends_every_wait(tmp_path):
    async with Server(tmp_path) as server:
        await server.start()
        async with RemoteWorkspace(f"http://127.0.0.1:{server.port}", KEY) as workspace:
            conversation = Conversation(TWO, workspace)
            await conversation.state()
            await server.stop()
            await server.start(AGENT_SERVER_API_KEY="another-key-0123456789abcdef")
            for work in (conversation.run, workspace.describe, conversation.state):
                with pytest.raises(Unauthorized):
                    await work()
