"""The blocking API from any number of threads: no wait is for ever, callbacks keep their order."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from agent_sdk import Agent, events, sync, tool
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.testing import ScriptedLLM, call, hang, say

THREADS = 8


@pytest.fixture(params=["here", "there"])
def workspace(request, tmp_path, running_server):
    if request.param == "here":
        place = sync.LocalWorkspace(tmp_path)
    else:
        place = sync.RemoteWorkspace(running_server.url, running_server.api_key)
    with place:
        yield place


@contextmanager
def thread(function, *args):
    """Run it beside the block, and wait for its end."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *args)


def talking(workspace, steps, **options):
    return sync.Conversation(Agent(llm=ScriptedLLM(steps)), workspace, **options)


def test_a_second_thread_interrupts_what_the_first_waits_for(workspace):
    working = threading.Event()

    def on_event(event):
        if isinstance(event, events.TurnStarted):
            working.set()

    with talking(workspace, [hang(), say("never")], callbacks=[on_event]) as conversation:
        conversation.send_message("go")
        with thread(conversation.run) as running:
            assert working.wait(60)
            conversation.interrupt("enough")
            assert running.result().status == "interrupted"


def test_commands_run_from_many_threads_at_once_and_output_comes_in_the_thread_of_its_call(workspace):
    heard = []

    def run(number):
        result = workspace.execute(
            f"echo {number}", on_output=lambda _, data: heard.append((number, threading.get_ident(), data))
        )
        return number, threading.get_ident(), result.out.head

    with ThreadPoolExecutor(THREADS) as pool:
        ran = list(pool.map(run, range(3 * THREADS)))
    assert sorted(heard) == ran
    assert [said for _, _, said in ran] == [b"%d\n" % number for number in range(3 * THREADS)]


def test_callbacks_come_once_each_in_order_and_one_at_a_time_whoever_waits(workspace):
    seen, inside = [], threading.Lock()

    def on_event(event):
        assert inside.acquire(blocking=False)
        seen.append((event.seq, conversation.cursor.seq))
        conversation.state()
        inside.release()

    steps = [*[call("think", thought="hm")] * 10, say("done")]
    conversation = talking(workspace, steps, callbacks=[on_event])
    with conversation:
        conversation.send_message("go")
        over = threading.Event()

        def ask():
            while not over.is_set():
                conversation.stats()

        with ThreadPoolExecutor(THREADS) as pool:
            asking = [pool.submit(ask) for _ in range(THREADS)]
            assert conversation.run().final_text == "done"
            over.set()
        assert not any(one.exception() for one in asking)
        written = [event.seq for event in conversation.events()]
    assert seen == [(seq, seq) for seq in written]


def test_what_waits_in_other_threads_ends_when_one_closes_the_workspace(workspace):
    process = workspace.start("echo on; exec sleep 600")
    conversation = talking(workspace, [hang(3), say("a remote turn goes on")])
    conversation.send_message("go")
    following = conversation.events(follow=True)
    next(following)
    begun = threading.Barrier(5)

    def waits(function, *args):
        begun.wait()
        with suppress(AgentServerError, OSError):
            function(*args)

    with ThreadPoolExecutor(4) as pool:
        ends = [
            pool.submit(waits, conversation.run),
            pool.submit(waits, list, following),
            pool.submit(waits, workspace.execute, "exec sleep 600"),
            pool.submit(waits, process.wait),
        ]
        begun.wait()
        workspace.__exit__()
        for end in ends:
            end.result()


def test_ctrl_c_in_one_thread_is_nothing_to_the_others(workspace):
    ready = threading.Event()

    def press_ctrl_c(_, __):
        raise KeyboardInterrupt

    def talk():
        return workspace.execute("echo on; read; echo over", stdin="\n", on_output=lambda *_: ready.set())

    with ThreadPoolExecutor(2) as pool:
        pressed = pool.submit(workspace.execute, "echo on; exec sleep 600", on_output=press_ctrl_c)
        other = pool.submit(talk)
        assert isinstance(pressed.exception(), KeyboardInterrupt)
        assert other.result().stdout == "on\nover\n"
    assert workspace.execute("echo on").stdout == "on\n"


def test_the_handler_of_a_signal_may_call_what_its_thread_waits_in(workspace):
    def on_event(event):
        if isinstance(event, events.TurnStarted):
            os.kill(os.getpid(), signal.SIGUSR1)

    with talking(workspace, [hang(), say("never")], callbacks=[on_event]) as conversation:
        before = signal.signal(signal.SIGUSR1, lambda *_: conversation.interrupt("pressed"))
        try:
            conversation.send_message("go")
            assert conversation.run().reason == "pressed"
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_each_thread_follows_an_iterator_of_its_own(workspace):
    process = workspace.start("for i in 1 2 3 4 5; do echo $i; done")
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda _: b"".join(process.output()), range(THREADS))
    assert set(read) == {b"1\n2\n3\n4\n5\n"}


def test_a_tool_of_this_process_may_block_in_the_workspace_and_an_async_one_is_told_that_it_cannot(workspace):
    @tool
    def blocks() -> str:
        """Say where we are."""
        return workspace.execute("echo from the tool").stdout

    @tool
    async def deadlocks() -> str:
        """Say where we are."""
        return workspace.execute("echo never").stdout

    agent = Agent(
        llm=ScriptedLLM([call("blocks"), call("deadlocks"), say("done")]), tools=[blocks, deadlocks]
    )
    with sync.Conversation(agent, workspace) as conversation:
        conversation.send_message("go")
        conversation.run()
        first, second = [e for e in conversation.events() if isinstance(e, events.ToolReturned)]
    assert (first.text, first.is_error) == ("from the tool\n", False)
    assert "would wait for itself" in second.text
    assert second.is_error


def test_an_async_callback_is_run_too(workspace):
    seen = []

    async def on_event(event):
        seen.append(event.seq)

    with talking(workspace, [say("done")], callbacks=[on_event]) as conversation:
        conversation.send_message("go")
        conversation.run()
        assert seen == [event.seq for event in conversation.events()]


@pytest.mark.parametrize(
    "left",
    [
        "",
        "it = c.events(follow=True); next(it)",
        "c.send_message('again')",
        "w = sync.LocalWorkspace(); w.__enter__(); it = w.start('echo on; exec sleep 600').output(); next(it)",
    ],
    ids=["nothing", "an iterator", "a turn", "a workspace with commands"],
)
def test_a_program_that_closes_nothing_comes_to_its_end_and_leaves_nothing(tmp_path, left):
    program = f"""
from agent_sdk import Agent, sync
from agent_sdk.testing import ScriptedLLM, call, say
llm = ScriptedLLM([say("done"), call("terminal", command="sleep 600"), say("never")])
c = sync.Conversation(Agent(llm=llm), {str(tmp_path)!r})
c.send_message("go")
print(c.run().final_text)
{left}
"""
    command = [sys.executable, "-W", "error", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_a_call_after_the_end_fails_as_the_async_one_and_leaves_no_thread(workspace):
    conversation = talking(workspace, [say("done")])
    conversation.send_message("go")
    conversation.run()
    conversation.close()
    workspace.__exit__()
    for late in (conversation.state, workspace.describe, lambda: workspace.execute("true")):
        with suppress(AgentServerError, OSError):
            late()
    assert not [one for one in threading.enumerate() if "portal" in one.name]
