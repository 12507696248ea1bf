"""The contract of a conversation holds on a server, too; and several clients share one conversation."""

import asyncio
import uuid
from contextlib import AsyncExitStack, suppress

import aiohttp
import pytest

from agent_sdk import Agent, Conversation, RemoteWorkspace
from agent_sdk.protocol.errors import ConversationNotFound, OpMismatch, StateConflict
from agent_sdk.protocol.events import UserMessage
from agent_sdk.testing import ScriptedLLM, call, say
from tests.contract.conversation import ConversationContract


class TestOnAServer(ConversationContract):
    @pytest.fixture
    async def open(self, running_server, places):
        async with AsyncExitStack() as stack:

            async def open(agent, **options):
                workspace = await stack.enter_async_context(
                    RemoteWorkspace(running_server.url, running_server.api_key)
                )
                conversation = Conversation(agent, workspace, **options)
                places[conversation] = workspace
                return conversation

            yield open


@pytest.mark.elsewhere
class TestHereWithAWorkspaceThere(ConversationContract):
    @pytest.fixture
    async def open(self, running_server, places):
        async with AsyncExitStack() as stack:

            async def open(agent, **options):
                workspace = await stack.enter_async_context(
                    RemoteWorkspace(running_server.url, running_server.api_key)
                )
                conversation = Conversation(agent, workspace, agent_runs="here", **options)
                places[conversation] = workspace
                return conversation

            yield open


AGENT = Agent(llm=ScriptedLLM([call("terminal", command="echo made > it.txt"), say("done")]))


async def test_a_second_conversation_shares_the_folder_and_has_its_own_log(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        first, second = Conversation(AGENT, workspace), Conversation(AGENT, workspace)
        await first.send_message("go")
        await first.run()
        await second.send_message("go")
        await second.run()
        assert first.id != second.id
        assert (await workspace.files.read("it.txt")) == b"made\n"


@pytest.mark.parametrize("rounds", [1, 5, 20, 60])
async def test_a_conversation_that_is_closed_while_it_opens_accepts_nothing(running_server, rounds):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        first = Conversation(AGENT, workspace)
        await first.state()
        before = asyncio.all_tasks()
        conversation = Conversation(AGENT, workspace)
        sending = [asyncio.create_task(conversation.send_message(text)) for text in "12"]
        for _ in range(rounds):
            await asyncio.sleep(0)
        await conversation.close()
        for task in sending:
            with pytest.raises(StateConflict):
                await task
        assert asyncio.all_tasks() == before  # nothing of its connection lives on
        if conversation.id:
            again = Conversation(None, workspace, id=conversation.id)
            with suppress(ConversationNotFound):
                assert not [event async for event in again.events() if isinstance(event, UserMessage)]


async def test_another_client_attaches_by_id_and_sees_the_same_events(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(AGENT, workspace)
        await conversation.send_message("go")
        await conversation.run()
        mine = [event async for event in conversation.events()]
        async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
            attached = Conversation(None, other, id=conversation.id)
            theirs = [event async for event in attached.events()]
        assert theirs == mine


async def test_the_workspace_of_an_existing_conversation_can_be_entered(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(AGENT, workspace)
        await conversation.send_message("go")
        await conversation.run()
        again = RemoteWorkspace(running_server.url, running_server.api_key, conversation=conversation.id)
        async with again:
            assert await again.files.read("it.txt") == b"made\n"
            assert (await Conversation(None, again).state()).id == conversation.id


def at(server, **options) -> RemoteWorkspace:
    return RemoteWorkspace(server.url, server.api_key, **options)


async def listed(server) -> set[str]:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {server.api_key}"}) as http:
        answer = await http.get(f"{server.url}/v1/conversations", params={"limit": 1000})
        return {conversation["id"] for conversation in await answer.json()}


async def test_an_id_of_the_caller_makes_a_conversation_and_later_attaches_to_it(running_server):
    id, before, heard = str(uuid.uuid4()), await listed(running_server), []
    async with at(running_server) as workspace:
        conversation = Conversation(AGENT, workspace, id=id, callbacks=[heard.append])
        await conversation.send_message("go")
        await conversation.run()
        assert await workspace.files.read("it.txt") == b"made\n"
        mine = [event async for event in conversation.events()]
    assert heard == mine
    assert await listed(running_server) - before == {id}  # and nothing that was made by entering
    async with at(running_server) as workspace:
        attached = Conversation(AGENT, workspace, id=id)
        assert [event async for event in attached.events()] == mine
        assert await workspace.files.read("it.txt") == b"made\n"


async def test_conversations_that_are_made_at_the_same_time_share_the_folder(running_server):
    async with at(running_server) as workspace:
        ids = [str(uuid.uuid4()), str(uuid.uuid4()), None]
        several = [Conversation(AGENT, workspace, id=id) for id in ids]
        await asyncio.gather(*(conversation.send_message("go") for conversation in several))
        await asyncio.gather(*(conversation.run() for conversation in several))
        states = [await conversation.state() for conversation in several]
        assert len({state.id for state in states}) == 3
        assert len({state.workspace for state in states}) == 1
        assert await workspace.files.read("it.txt") == b"made\n"


async def test_a_workspace_in_use_does_not_become_another_one(running_server):
    async with at(running_server) as theirs, at(running_server) as workspace:
        other = Conversation(AGENT, theirs)
        await other.state()
        await workspace.files.write("mine", b"")
        attached = Conversation(AGENT, workspace, id=other.id)
        with pytest.raises(
            StateConflict, match=rf"RemoteWorkspace\(url, api_key, conversation='{other.id}'\)"
        ):
            await attached.send_message("go")
        assert [info.path for info in await workspace.files.list()] == ["mine"]


async def test_an_existing_conversation_does_not_take_a_folder_of_another(running_server, tmp_path):
    async with at(running_server) as theirs, at(running_server, working_dir=str(tmp_path)) as workspace:
        other = Conversation(AGENT, theirs)
        await other.state()
        with pytest.raises(OpMismatch, match="another workspace"):
            await Conversation(AGENT, workspace, id=other.id).send_message("go")


async def test_an_unknown_id_is_a_conversation_that_is_not_found(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        nobody = Conversation(None, workspace, id="01900000-0000-7000-8000-000000000000")
        with pytest.raises(ConversationNotFound):
            await nobody.state()


async def test_the_end_of_a_turn_that_ended_before_attaching_is_still_told(running_server):
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(AGENT, workspace)
        await conversation.send_message("go")
        outcome = await conversation.run()
        async with RemoteWorkspace(running_server.url, running_server.api_key) as other:
            assert await Conversation(None, other, id=conversation.id).run() == outcome
