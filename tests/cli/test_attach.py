"""agent-server attach: history, then what happens; lines typed or piped are messages."""

import json
import os
import pty
import signal

import pytest

from agent_sdk import Agent, ConfirmationPolicy, Conversation, RemoteWorkspace, sync
from agent_sdk.testing import ScriptedLLM, call, say


@pytest.fixture
def conversation(running_server):
    """A conversation that has said `one` and will say `two`, then `three`."""
    llm = ScriptedLLM([say("one"), say("two"), say("three")])
    with sync.RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = sync.Conversation(Agent(llm=llm), workspace)
        conversation.send_message("first")
        assert conversation.run().final_text == "one"
        return conversation.id


class Person:
    """Somebody at a terminal."""

    def __init__(self, shell, *words):
        self._here, there = pty.openpty()
        self.process = shell.start(*words, stdin=there, stdout=there, stderr=there, start_new_session=True)
        os.close(there)
        self.screen = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait(timeout=30)
        os.close(self._here)

    def reads(self, text):
        """Wait until this is on the screen."""
        while text not in self.screen:
            self.screen += os.read(self._here, 4096).decode()

    def types(self, text):
        os.write(self._here, text.encode())

    def leaves(self):
        """Press Ctrl-C; the exit code. No terminal is attached that would turn the key into a signal."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


def test_piped_lines_are_messages_and_the_last_answer_is_awaited(client, conversation):
    done = client.run("attach", conversation, stdin=b"second\n\nthird")
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode()
    assert said.index("you: first\n") < said.index("agent: one\n") < said.index("you: second\n")
    assert said.index("agent: two\n") < said.index("agent: three\n")


def test_history_can_be_left_out(client, conversation):
    last = json.loads(client.run("events", conversation, "--json").stdout.splitlines()[-1])["seq"]
    done = client.run("attach", conversation, "--since", str(last), stdin=b"second\n")
    assert done.stdout.decode().startswith("you: second\nagent: two\n[finished")


def test_a_person_types_reads_and_leaves_with_ctrl_c(client, conversation):
    with Person(client, "attach", conversation) as person:
        person.reads("agent: one")
        person.types("second\n")
        person.reads("agent: two")
        assert person.leaves() == 0
    assert "you: second" not in person.screen


def test_what_a_person_orders_wrongly_is_told_and_costs_nothing(client, conversation):
    with Person(client, "attach", conversation) as person:
        person.types("/approve\n/dance\n")
        person.reads("nothing waits for an approval")
        person.reads("there is no /dance; a line is a message; /approve")
        assert person.leaves() == 0


def test_the_end_of_a_persons_input_leaves(client, conversation):
    with Person(client, "attach", conversation) as person:
        person.reads("agent: one")
        person.types("\x04")
        assert person.process.wait(timeout=30) == 0


async def test_a_person_approves_what_the_agent_may_do(client, running_server):
    llm = ScriptedLLM([call("terminal", command="echo done > it.txt"), say("Done.")])
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(Agent(llm=llm), workspace, confirmation=ConfirmationPolicy(mode="always"))
        await conversation.send_message("Do it")
        with Person(client, "attach", conversation.id) as person:
            person.reads("waits for approval")
            person.types("/approve\n")
            person.reads("agent: Done.")
            assert person.leaves() == 0
        assert (await workspace.files.read("it.txt")) == b"done\n"


async def test_the_agent_goes_on_when_its_watcher_left(client, running_server):
    llm = ScriptedLLM([call("terminal", command="read line; echo got $line"), say("Done.")])
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(Agent(llm=llm), workspace)
        await conversation.send_message("Wait for somebody")
        with Person(client, "attach", conversation.id) as person:
            person.reads("$ read line")
            assert person.leaves() == 0
        assert (await conversation.state()).state == "running"
        await conversation.interrupt()
