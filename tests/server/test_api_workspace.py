"""APIRemoteWorkspace against our own Runtime API, with processes behind it."""

import asyncio
import inspect

import pytest

from agent_sdk import Agent, Conversation
from agent_sdk.protocol.errors import InvalidParams, RemoteApiError
from agent_sdk.testing import ScriptedLLM, call, say
from tests.server.test_runtime_api import ALICE, BOB, IMAGE, client, options
from workspaces import APIRemoteWorkspace
from workspaces.sync import APIRemoteWorkspace as blocking


@pytest.fixture
async def server(start):
    async with start(**options()) as server:
        yield server


def there(server, key=ALICE, **more):
    return APIRemoteWorkspace(server.url, key, IMAGE, **more)


async def sessions(server):
    async with client(server) as api:
        return (await api.ask("GET", "/list"))["runtimes"]


async def test_entering_starts_a_server_and_leaving_ends_it(server):
    async with there(server) as workspace:
        assert (await workspace.execute("echo hi")).stdout == "hi\n"
        (runtime,) = await sessions(server)
        assert (runtime["runtime_id"], runtime["session_id"]) == (workspace.runtime_id, workspace.session_id)
    assert await sessions(server) == []


async def test_an_agent_works_there_as_anywhere(server):
    agent = Agent(llm=ScriptedLLM([call("terminal", command="echo made > it.txt"), say("done")]))
    async with there(server) as workspace:
        conversation = Conversation(agent, workspace)
        await conversation.send_message("go")
        assert (await conversation.run()).final_text == "done"
        assert await workspace.files.read("it.txt") == b"made\n"


async def test_a_runtime_that_is_kept_alive_is_attached_to_by_its_session(server):
    async with there(server, keep_alive=True) as first:
        await first.execute("sleep 0")
        folder = (await first.describe()).root
        await first.execute("echo kept > file")
    async with there(server, session_id=first.session_id) as second:
        assert second.runtime_id == first.runtime_id
        assert (await second.execute(f"cat {folder}/file")).stdout == "kept\n"
    assert await sessions(server) == []


async def test_a_runtime_that_was_paused_at_the_end_is_resumed_with_its_files(server):
    async with there(server, pause_on_close=True) as first:
        folder = (await first.describe()).root
        await first.execute("echo kept > file")
    assert [runtime["status"] for runtime in await sessions(server)] == ["paused"]
    async with there(server, session_id=first.session_id) as second:
        assert (await second.execute(f"cat {folder}/file")).stdout == "kept\n"


async def test_what_is_asked_while_it_is_paused_goes_on_after_it_was_resumed(server):
    async with there(server) as workspace:
        await workspace.execute("echo kept > file")
        await workspace.pause()
        asked = asyncio.create_task(workspace.execute("cat file"))
        await workspace.resume()
        assert (await asked).stdout == "kept\n"


async def test_an_exception_in_the_block_ends_the_runtime_too(server):
    with pytest.raises(ZeroDivisionError):
        async with there(server):
            raise ZeroDivisionError
    assert await sessions(server) == []


async def test_a_start_that_is_cancelled_leaves_no_runtime(server):
    waiting = asyncio.Event()

    def on_progress(phase, done, total):
        if phase == "ready":
            waiting.set()

    entering = asyncio.create_task(there(server, on_progress=on_progress).__aenter__())
    await waiting.wait()
    assert len(await sessions(server)) == 1
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert await sessions(server) == []


async def test_the_session_of_another_tenant_is_a_session_of_ones_own(server):
    async with there(server, session_id="same") as mine, there(server, BOB, session_id="same") as theirs:
        assert mine.runtime_id != theirs.runtime_id


async def test_a_wrong_key_is_one_sentence(server):
    with pytest.raises(RemoteApiError, match="answered 401 to attach: wrong API key") as refused:
        async with there(server, "wrong-key"):
            pass
    assert refused.value.details["status"] == 401


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"resource_factor": 3}, "resource_factor must be 1, 2, 4 or 8"),
        ({"keep_alive": True, "pause_on_close": True}, "contradict"),
    ],
)
async def test_options_that_make_no_sense_are_refused_at_once(arguments, sentence):
    with pytest.raises(InvalidParams, match=sentence):
        APIRemoteWorkspace("http://127.0.0.1:1", "key", IMAGE, **arguments)


# --- blocking ---


def test_the_blocking_twin_takes_the_same_options():
    ours, theirs = (inspect.signature(kind).parameters.values() for kind in (blocking, APIRemoteWorkspace))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


async def test_the_blocking_twin_starts_pauses_resumes_and_ends_a_runtime(server):
    def use():
        phases = []
        options = {"on_progress": lambda phase, done, total: phases.append((phase, done))}
        with blocking(server.url, ALICE, IMAGE, env={"COLOUR": "blue"}, **options) as workspace:
            assert workspace.execute_command("echo $COLOUR").stdout == "blue\n"
            assert workspace.runtime_id
            workspace.pause()
            workspace.resume()
            assert workspace.execute_command("echo $COLOUR").stdout == "blue\n"
        return phases

    assert await asyncio.to_thread(use) == [("attach", 0), ("start", 0), ("ready", 0), ("ready", 1)]
    assert await sessions(server) == []
