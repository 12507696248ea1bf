"""Workspaces and conversations for one test, of which the server keeps nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from agent_sdk import Conversation, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.remote.link import ask
from tests.contract.vocabulary import Open, Places


@asynccontextmanager
async def fresh(workspace: RemoteWorkspace) -> AsyncIterator[RemoteWorkspace]:
    async with workspace:
        yield workspace
        with suppress(AgentServerError):  # the test has deleted it
            await ask(workspace.link, Delete(op_id=new_id()))


@asynccontextmanager
async def conversations(places: Places, make: Callable[[], RemoteWorkspace]) -> AsyncIterator[Open]:
    """Conversations in a workspace of their own each."""
    async with AsyncExitStack() as stack:

        async def open(agent, **options):
            workspace = await stack.enter_async_context(fresh(make()))
            conversation = Conversation(agent, workspace, **options)
            places[conversation] = workspace
            return conversation

        yield open
