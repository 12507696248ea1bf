"""agent-server cp, ls, events: files and history of a workspace on a server."""

import json
import os
import re
import signal

import pytest

from agent_sdk.sync import Agent, Conversation, RemoteWorkspace
from agent_sdk.testing import ScriptedLLM, call, say


@pytest.fixture(scope="module")
def conversation(running_server):
    """A conversation of the server in which an agent has done something."""
    llm = ScriptedLLM(
        [call("terminal", command="echo hello | tee said.txt"), say("It says hello."), say("Again.")]
    )
    with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        conversation = Conversation(Agent(llm=llm), workspace)
        conversation.send_message("Say hello")
        assert conversation.run().status == "finished"
        return conversation.id


def test_a_file_goes_in_and_comes_back_with_its_mode(client, conversation):
    data = os.urandom(200_000)
    source = client.folder / "tool.bin"
    source.write_bytes(data)
    source.chmod(0o750)
    there = client.run("cp", "--conversation", conversation, "tool.bin", ":bin/")
    back = client.run("cp", "--conversation", conversation, ":bin/tool.bin", "copy.bin")
    assert (there.returncode, back.returncode) == (0, 0), there.stderr + back.stderr
    assert there.stdout.startswith(b"tool.bin -> :bin/tool.bin: 200000 bytes, sha256 ")
    copy = client.folder / "copy.bin"
    assert (copy.read_bytes(), copy.stat().st_mode & 0o777) == (data, 0o750)


def test_a_folder_of_this_machine_takes_the_file_under_its_name(client, conversation):
    done = client.run("cp", "--conversation", conversation, ":said.txt", ".")
    assert done.returncode == 0, done.stderr
    assert (client.folder / "said.txt").read_bytes() == b"hello\n"


def test_copying_into_a_fresh_workspace_tells_whose_it_is(client):
    (client.folder / "a.txt").write_text("a")
    where = client.environ["AGENT_SERVER_URL"]
    done = client.run("cp", "--workspace", where, "a.txt", ":")
    found = re.search(rb"in the workspace of conversation (\S+)\n$", done.stdout)
    assert found, done
    assert client.run("exec", "--conversation", found[1].decode(), "cat a.txt").stdout == b"a"


def test_copying_within_this_machine_needs_no_server(shell):
    (shell.folder / "a.txt").write_text("a")
    done = shell.run("cp", "a.txt", ":sub/b.txt")
    assert done.returncode == 0, done.stderr
    assert (shell.folder / "sub" / "b.txt").read_text() == "a"


def test_a_folder_goes_in_and_comes_back_as_with_docker_cp(client, conversation):
    def cp(*words):
        done = client.run("cp", "--conversation", conversation, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    (client.folder / "data" / "deep").mkdir(parents=True)
    (client.folder / "data" / "a").write_text("a")
    (client.folder / "data" / "deep" / "b").write_text("b")
    assert cp("data", ":box").startswith("data -> :box: a folder, as an archive of ")
    assert cp("data", ":box").startswith("data -> :box/data: a folder")
    assert cp("data/.", ":box/deep", "--exclude", "deep").startswith("data/. -> :box/deep: a folder")
    cp(":box", "back")
    cp(":box/data", "back/deep")
    cp(":box/data/.", ".")
    found = {str(path.relative_to(client.folder)) for path in client.folder.rglob("*") if path.is_file()}
    assert {path for path in found if path.startswith("back")} == {
        *("back/a", "back/deep/b", "back/data/a", "back/data/deep/b"),
        *("back/deep/a", "back/deep/data/a", "back/deep/data/deep/b"),
    }
    assert {"a", "deep/b"} <= found


def test_a_folder_of_the_workspace_takes_a_file_under_its_name(client, conversation):
    (client.folder / "new.txt").write_text("new")
    client.run("exec", "--conversation", conversation, "mkdir -p there; ln -s there link")
    done = client.run("cp", "--conversation", conversation, "new.txt", ":link")
    assert done.stdout.startswith(b"new.txt -> :link/new.txt: 3 bytes"), done.stderr
    assert client.run("exec", "--conversation", conversation, "cat there/new.txt").stdout == b"new"


def test_standard_input_and_output_are_files(client, conversation):
    data = os.urandom(300_000)
    there = client.run("cp", "--conversation", conversation, "-", ":piped/data", stdin=data)
    assert there.stdout.startswith(b"- -> :piped/data: 300000 bytes, sha256 "), there.stderr
    back = client.run("cp", "--conversation", conversation, ":piped/data", "-")
    assert (back.stdout, back.stderr, back.returncode) == (data, b"", 0)


def test_a_broken_copy_leaves_nothing_behind(client, conversation):
    done = client.run("cp", "--conversation", conversation, ":nowhere", "copy")
    assert done.returncode == 1
    assert list(client.folder.glob("copy*")) == []


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("../stray", b"leads out of the workspace: ../stray"), ("said.txt/x", b"a directory: said.txt/x")],
)
def test_a_refused_copy_of_a_long_file_is_one_sentence(client, conversation, target, sentence):
    (client.folder / "long").write_bytes(bytes(3_000_000))
    done = client.run("cp", "--conversation", conversation, "long", f":{target}")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1), done.stderr
    assert sentence in done.stderr


def test_the_list_shows_a_conversation(client, conversation):
    head, *rows = client.run("ls").stdout.decode().splitlines()
    assert head.split() == ["CONVERSATION", "STATE", "UPDATED", "EVENTS", "MODEL", "TITLE"]
    assert any(row.startswith(conversation) and " idle " in row and " scripted" in row for row in rows)


def test_the_list_is_json_for_programs(client, conversation):
    rows = [json.loads(line) for line in client.run("ls", "--json").stdout.splitlines()]
    assert conversation in [row["id"] for row in rows]


def test_the_history_of_a_conversation_is_the_log(client, conversation):
    lines = client.run("events", conversation, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (events[0]["type"], events[-1]["type"]) == ("conversation_created", "turn_ended")


def test_the_history_can_begin_after_a_seq(client, conversation):
    whole = client.run("events", conversation, "--json").stdout.splitlines()
    assert client.run("events", conversation, "--json", "--since", "3").stdout.splitlines() == whole[3:]


def test_people_read_the_history_as_a_transcript(client, conversation):
    said = client.run("events", conversation).stdout.decode()
    assert "you: Say hello\n" in said
    assert "  > $ echo hello | tee said.txt\n    hello\n" in said
    assert "agent: It says hello.\n[finished - 2 steps" in said


def test_following_goes_on_with_what_happens_until_ctrl_c(client, conversation):
    old = client.run("events", conversation, "--json").stdout.splitlines()
    with client.start("events", conversation, "--json", "--follow", "--since", str(len(old))) as following:
        done = client.run("run", "Again", "--conversation", conversation)
        new = [json.loads(following.stdout.readline()) for _ in range(3)]
        following.send_signal(signal.SIGINT)
        assert following.wait(timeout=30) == 130
        assert following.stderr.read() == b""
    assert done.returncode == 0, done.stderr
    assert [event["seq"] for event in new] == [len(old) + 1, len(old) + 2, len(old) + 3]
