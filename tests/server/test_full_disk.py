"""A turn that cannot be written down: nobody waits for it without a word, and it goes on when there is room."""

from __future__ import annotations

import asyncio
import os

import pytest

from agent_sdk import Agent, Conversation, RemoteWorkspace
from agent_sdk.testing import ScriptedLLM, call, say
from tests.chaos.disk import small
from tests.contract.vocabulary import Gate
from tests.server.conftest import KEY
from tests.server.wire import GUARD

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")


@ROOT_ONLY
async def test_a_turn_whose_log_has_no_room_says_so_and_goes_on_when_there_is(start, tmp_path):
    gate, told, no_room = Gate(), [], asyncio.Event()
    agent = Agent(llm=ScriptedLLM([call("gate"), say("done")]), tools=[gate.tool])

    def tell(wait) -> None:
        told.append(wait)
        if "no space is left" in wait.reason:
            no_room.set()

    async with (
        asyncio.timeout(GUARD),
        small(tmp_path / "disk", 24 << 20) as disk,
        start(data=str(disk / "data")) as server,
        RemoteWorkspace(server.url, KEY) as workspace,
    ):
        conversation = Conversation(agent, workspace, on_waiting=tell)
        await conversation.send_message("go")
        running = asyncio.create_task(conversation.run())
        await gate.reached()
        await conversation.set_title("behind the call of run, which is in the log then")
        with (disk / "junk").open("wb", buffering=0) as junk, pytest.raises(OSError, match="No space"):
            while True:
                junk.write(bytes(1 << 12))
        gate.release.set()
        await no_room.wait()
        assert not running.done()
        (disk / "junk").unlink()
        assert (await running).final_text == "done"
        assert (await conversation.state()).waits == ()
