"""Conversations and their log: going on after a restart, a crash, a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_sdk.conversation.local import FILE_NAME, LocalConversation
from agent_sdk.protocol.events import (
    AgentConfigured,
    Interrupted,
    RequestResolved,
    ToolReturned,
    TurnStarted,
    kind_of,
)
from agent_sdk.testing import call, calls, hang, say
from tests.contract.vocabulary import PATIENCE, acting, ended, last_result, past, these

ROOT = Path(__file__).parents[2]
MINE = "01900000-0000-7000-8000-000000000001"


async def test_the_same_id_goes_on_where_it_was(tmp_path):
    agent = acting(call("think", thought="hm"), say("one"), say("two"))
    options = {"id": MINE, "persistence_dir": tmp_path / "log", "title": "T"}
    async with LocalConversation(agent, tmp_path, **options) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
        before, stats, epoch = await past(first), await first.stats(), first.epoch
    async with LocalConversation(agent, tmp_path, **options) as second:
        assert await past(second) == before
        assert (await second.stats(), second.epoch) == (stats, epoch)
        assert (await second.state()).title == "T"
        await second.send_message("2")
        assert (await second.run(timeout=PATIENCE)).final_text == "two"


async def test_callbacks_of_a_reopened_conversation_hear_what_is_new(tmp_path):
    options = {"id": MINE, "persistence_dir": tmp_path}
    async with LocalConversation(acting(say("one")), tmp_path, **options) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
        head = first.head_seq
    heard = []
    async with LocalConversation(acting(say("one")), tmp_path, callbacks=[heard.append], **options) as second:
        await second.set_title("new")
    assert [event.seq for event in heard] == [head + 1]


async def test_another_agent_is_written_down_when_the_conversation_is_opened_again(tmp_path):
    options = {"id": MINE, "persistence_dir": tmp_path}
    async with LocalConversation(acting(say("one")), tmp_path, **options):
        pass
    async with LocalConversation(acting(say("one"), tools=["think"]), tmp_path, **options) as second:
        assert [event.tools for event in await these(second, AgentConfigured)][1:] == [("think",)]


async def test_a_closed_turn_may_be_continued_when_the_log_is_opened_again(tmp_path):
    options = {"id": MINE, "persistence_dir": tmp_path}
    async with LocalConversation(acting(hang(), say("done")), tmp_path, **options) as first:
        await first.send_message("go")
    async with LocalConversation(acting(say("done")), tmp_path, **options) as second:
        assert (await ended(second)).status == "interrupted"
        assert await these(second, Interrupted) == []
        assert (await second.state()).state == "paused"
        assert (await second.run(timeout=PATIENCE)).final_text == "done"


async def test_the_list_of_tasks_survives(tmp_path):
    plan = call("task_tracker", command="plan", task_list=[{"title": "survive", "status": "done"}])
    view = call("task_tracker", command="view")
    options = {"id": MINE, "persistence_dir": tmp_path}
    async with LocalConversation(acting(plan, say("one"), view, say("two")), tmp_path, **options) as first:
        await first.send_message("1")
        await first.run(timeout=PATIENCE)
    async with LocalConversation(acting(plan, say("one"), view, say("two")), tmp_path, **options) as second:
        await second.send_message("2")
        await second.run(timeout=PATIENCE)
        assert "[x] survive" in (await last_result(second)).text


CRASHES = """
import asyncio, sys
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.definition import Agent
from agent_sdk.protocol.specs import ScriptedLLM, ConfirmationPolicy
from agent_sdk.protocol.events import RequestOpened
from agent_sdk.testing import call, calls, say

async def main():
    agent = Agent(llm=ScriptedLLM(steps=(calls(call("think", thought="a"), call("terminal", command="true")),)))
    policy = ConfirmationPolicy(tools=("terminal",))
    conversation = LocalConversation(
        agent, sys.argv[1], id="01900000-0000-7000-8000-000000000001", persistence_dir=sys.argv[1], confirmation=policy
    )
    await conversation.send_message("go")
    async for event in conversation.events(follow=True):
        if event.__struct_config__.tag == "tool_returned":
            print("now", flush=True)
            sys.stdin.read()

asyncio.run(main())
"""


def crashed(folder: Path) -> None:
    """A process that dies while its agent waits for an approval, with one of two results written."""
    child = subprocess.Popen(
        [sys.executable, "-c", CRASHES, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},  # what a killed process leaves behind goes with the test
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == b"now\n"
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()


async def test_a_turn_whose_process_died_is_closed_once_and_may_be_continued(tmp_path):
    crashed(tmp_path)
    agent = acting(calls(call("think", thought="a"), call("terminal", command="true")), say("done"))
    options = {"id": MINE, "persistence_dir": tmp_path}
    async with LocalConversation(agent, tmp_path, **options) as conversation:
        results = await these(conversation, ToolReturned)
        assert [event.is_error for event in results] == [False, True]
        assert results[1].data == {"outcome": "unknown"}
        assert [event.answer for event in await these(conversation, RequestResolved)] == ["void"]
        end = await ended(conversation)
        assert (end.status, end.reason) == ("interrupted", "the process that ran it ended")
        assert end.run_id == (await these(conversation, TurnStarted))[0].run_id
        events = await past(conversation)
    async with LocalConversation(agent, tmp_path, **options) as conversation:
        assert [kind_of(event) for event in await past(conversation)] == [kind_of(event) for event in events]
        assert (await conversation.run(timeout=PATIENCE)).final_text == "done"


async def test_a_second_process_that_opens_the_conversation_takes_it(tmp_path):
    options = {"id": MINE, "persistence_dir": tmp_path}
    async with (
        LocalConversation(acting(say("one")), tmp_path, **options) as first,
        LocalConversation(acting(say("one")), tmp_path, **options) as second,
    ):
        await second.set_title("mine now")
        with pytest.raises(Exception, match="another process writes to this conversation"):
            await first.send_message("hello?")


# --- trouble ---


FULL = """
import asyncio, resource, sys
from agent_sdk.definition import Agent
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.specs import ScriptedLLM
from agent_sdk.testing import call, say
from agent_sdk.tools import tool

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

@tool
async def fill() -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
    return "x" * (3 << 20)

async def main():
    agent = Agent(llm=ScriptedLLM(steps=(call("fill"), say("done"))), tools=[fill])
    async with LocalConversation(agent, sys.argv[1], persistence_dir=sys.argv[1]) as conversation:
        await conversation.send_message("go")
        try:
            print((await conversation.run()).error)
        except StorageFull as exc:
            print(exc)
        print((await conversation.state()).state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print((await conversation.run()).final_text)
        async for event in conversation.events():
            print(event.__struct_config__.tag, getattr(event, "status", ""))

asyncio.run(main())
"""


def ran(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def test_a_turn_that_cannot_be_written_says_so_and_goes_on_when_there_is_room(tmp_path):
    """A file size limit stands in for the full disk."""
    lines = ran(FULL, str(tmp_path), "1")
    assert lines[:3] == [
        f"no space is left for the log {tmp_path / FILE_NAME}; make room and try again",
        "paused",
        "done",
    ]
    assert [line for line in lines if line.startswith("turn")] == [
        "turn_started ",
        "turn_ended interrupted",
        "turn_started ",
        "turn_ended finished",
    ]


async def test_a_result_that_finds_no_room_fails_the_turn_and_run_tries_again(tmp_path):
    lines = ran(FULL, str(tmp_path), str(2 << 20))
    assert lines[:3] == ["storage_full", "failed", "done"]
    assert lines[lines.index("model_used ") + 1 :][:3] == [
        "tool_returned ",
        "error_raised ",
        "turn_ended failed",
    ]


REFUSED = """
import asyncio, resource, sys
from agent_sdk.definition import Agent
from agent_sdk.conversation.local import LocalConversation
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.specs import ScriptedLLM
from agent_sdk.testing import say

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

async def main():
    agent = Agent(llm=ScriptedLLM(steps=(say("done"),)))
    async with LocalConversation(agent, sys.argv[1], persistence_dir=sys.argv[1]) as conversation:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        big = asyncio.create_task(conversation.send_message("x" * 100_000))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(conversation.run())
        for attempt in (big, waiting):
            try:
                await attempt
            except StorageFull:
                print("refused")
        print((await conversation.state()).state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        accepted = await conversation.send_message("go")
        outcome = await conversation.run()
        print(outcome.final_text, outcome.run_id == accepted.run_id)
        async for event in conversation.events():
            print(event.__struct_config__.tag, getattr(event, "status", ""))

asyncio.run(main())
"""


async def test_a_message_that_finds_no_room_begins_no_turn_and_the_next_one_does(tmp_path):
    lines = ran(REFUSED, str(tmp_path))
    assert lines[:4] == ["refused", "refused", "idle", "done True"]
    assert [line for line in lines if line.startswith(("turn", "user", "error"))] == [
        "user_message ",
        "turn_started ",
        "turn_ended finished",
    ]
