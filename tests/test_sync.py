"""The blocking names agree with the async ones, and callbacks run in the caller's thread."""

import inspect
import os
import threading

import anyio
import pytest

import agent_sdk
import workspaces.sync
from agent_sdk import Agent, api, sync
from agent_sdk.conversation import contract as conversation_contract
from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.testing import ScriptedLLM, call, say
from agent_sdk.workspace import contract as workspace_contract

TWINS = [
    (sync.Workspace, workspace_contract.Workspace),
    (sync.Process, workspace_contract.Process),
    (sync.Shell, workspace_contract.Shell),
    (sync.Files, workspace_contract.Files),
    (sync.Git, workspace_contract.Git),
    (sync.Conversation, conversation_contract.Conversation),
]
STREAMS = {"read_stream", "write_stream"}  # async by nature: their blocking form is upload and download


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("blocking", "contract"), TWINS)
def test_the_twins_agree(blocking, contract):
    for name, method in inspect.getmembers(contract, inspect.isfunction):
        if not name.startswith("_") and name not in STREAMS:
            assert parameters(getattr(blocking, name)) == parameters(method), name
            assert inspect.getdoc(getattr(blocking, name)) == inspect.getdoc(method), name


@pytest.mark.parametrize(
    ("twin", "fact"),
    [
        (sync.Process.id, workspace_contract.Process.id),
        (sync.Workspace.files, workspace_contract.Workspace.files),
        (sync.Conversation.id, conversation_contract.Conversation.id),
        (workspaces.sync.DockerWorkspace.container, workspaces.DockerWorkspace.container),
    ],
)
def test_a_property_is_described_as_in_the_contract(twin, fact):
    assert inspect.getdoc(twin) == inspect.getdoc(fact)


def test_a_result_gives_its_whole_output_and_its_process(tmp_path):
    with sync.LocalWorkspace(tmp_path) as workspace:
        result = workspace.execute("seq 1 500000; exit 3")
        assert result.truncated
        assert result.whole() == "".join(f"{number}\n" for number in range(1, 500_001)).encode()
        assert (result.returncode, result.process.wait().exit_code) == (3, 3)


def test_a_conversation_takes_the_same_options():
    assert parameters(sync.Conversation.__init__)[1:] == parameters(api.Conversation)


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [
        (sync.AgentServer, agent_sdk.AgentServer),
        (sync.LocalWorkspace, agent_sdk.LocalWorkspace),
        (sync.RemoteWorkspace, agent_sdk.RemoteWorkspace),
        (workspaces.sync.DockerWorkspace, workspaces.DockerWorkspace),
        (workspaces.sync.APIRemoteWorkspace, workspaces.APIRemoteWorkspace),
    ],
)
def test_a_twin_is_made_of_the_same_options(blocking, asynchronous):
    assert inspect.signature(blocking) == inspect.signature(asynchronous)
    assert inspect.getdoc(blocking.__init__) == inspect.getdoc(asynchronous.__init__)


def test_what_is_wrong_with_an_option_is_said_at_once():
    with pytest.raises(InvalidParams, match="on_connection"):
        sync.RemoteWorkspace("http://127.0.0.1:1", "key", on_connection=5)
    with pytest.raises(TypeError, match="api_kye"):
        sync.RemoteWorkspace("http://127.0.0.1:1", api_kye="key")


def test_callbacks_run_in_the_callers_thread_and_in_order(tmp_path):
    seen = []
    agent = Agent(llm=ScriptedLLM([call("think", thought="hm"), say("done")]))

    def on_event(event):
        seen.append((event.seq, threading.current_thread() is threading.main_thread()))

    with sync.Conversation(agent, tmp_path, callbacks=[on_event]) as conversation:
        conversation.send_message("go")
        assert conversation.run().final_text == "done"
        assert [event.seq for event in conversation.events()] == [seq for seq, _ in seen]
    assert [seq for seq, _ in seen] == list(range(1, len(seen) + 1))
    assert all(main for _, main in seen)


def test_a_blocking_callback_may_call_the_conversation(tmp_path):
    agent = Agent(llm=ScriptedLLM([say("done")]))
    states = []
    with sync.Conversation(agent, tmp_path, callbacks=[lambda _: states.append(conversation.state())]) as it:
        conversation = it
        conversation.send_message("go")
        conversation.run()
    assert states


def test_the_loop_thread_is_gone_after_the_last_block(tmp_path):
    with sync.LocalWorkspace(tmp_path) as one, sync.LocalWorkspace(tmp_path) as two:
        assert one.execute("echo 1").stdout == "1\n"
        assert two.execute_command("echo 2").stdout == "2\n"
        running = threading.active_count()
    assert threading.active_count() < running


def test_it_works_inside_a_running_loop(tmp_path):
    async def nested():
        with sync.LocalWorkspace(tmp_path) as workspace:
            return workspace.execute("echo nested").stdout

    assert anyio.run(nested) == "nested\n"


def test_errors_are_the_same_builtins(tmp_path):
    with sync.LocalWorkspace(tmp_path) as workspace, pytest.raises(FileNotFoundError):
        workspace.download("nowhere", tmp_path / "copy")


def test_output_and_process_output_can_be_followed(tmp_path):
    pieces = []
    with sync.LocalWorkspace(tmp_path) as workspace:
        workspace.execute("echo a; echo b >&2", on_output=lambda name, data: pieces.append((name, data)))
        process = workspace.start("cat")
        process.write(b"fed\n")
        process.close_stdin()
        assert b"".join(process.output()) == b"fed\n"
        assert process.wait().exit_code == 0
    assert sorted(pieces) == [("stderr", b"b\n"), ("stdout", b"a\n")]


def test_what_ctrl_c_interrupts_has_ended_when_the_caller_goes_on(tmp_path):
    started = []

    def press_ctrl_c(name, data):
        started.append(int(data))
        raise KeyboardInterrupt

    with sync.LocalWorkspace(tmp_path) as workspace:
        with pytest.raises(KeyboardInterrupt):
            workspace.execute("echo $$; exec sleep 600", on_output=press_ctrl_c)
        with pytest.raises(ProcessLookupError):
            os.kill(started[0], 0)
