"""agent-server rm, prune: conversations that may go, on a server of their own."""

import json
import re

import pytest

from agent_sdk.sync import AgentServer, RemoteWorkspace
from tests.cli.conftest import Shell
from tests.conftest import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def client(tmp_path, server):
    return Shell(tmp_path, {"AGENT_SERVER_URL": server.url, "AGENT_SERVER_API_KEY": server.api_key})


@pytest.fixture
def made(server):
    """Two conversations that hold something."""
    made = []
    for _ in range(2):
        with RemoteWorkspace(server.url, server.api_key) as workspace:
            workspace.execute("echo kept > file")
            made.append(workspace.asynchronous.conversation)
    return made


def listed(client, *words):
    return [json.loads(line)["id"] for line in client.run("ls", "--json", *words).stdout.splitlines()]


def test_conversations_are_removed_by_their_ids(client, server, made):
    assert listed(client, "--limit", "1") == made[1:]
    assert listed(client, "--tag", "no=such") == []
    done = client.run("rm", made[0], "nowhere", made[1])
    assert done.returncode == 1
    assert done.stdout.decode().split() == ["removed", made[0], "removed", made[1]]
    assert b"no conversation 'nowhere'" in done.stderr
    assert AgentServer(server.url, server.api_key).conversations() == []


def test_prune_removes_what_is_old_and_idle_enough_and_says_how_many(client, made):
    assert b"say which" in client.run("prune").stderr
    assert b"is no duration" in client.run("prune", "--idle", "1y").stderr
    assert client.run("prune", "--idle", "0s", "--older-than", "1d").stdout == b"removed 0 conversations\n"
    assert set(listed(client)) >= set(made)
    assert re.fullmatch(rb"removed [0-9]+ conversations\n", client.run("prune", "--idle", "0s").stdout)
    assert listed(client) == []


def test_a_conversation_that_runs_is_removed_by_force_alone(client, server, tmp_path):
    (tmp_path / "hang.json").write_text('[{"step": "hang"}]')
    words = ("run", "Hang", "--workspace", server.url, "--script", "hang.json", "--json")
    with client.start(*words) as running:
        id = ""
        while b'"turn_started"' not in (line := running.stdout.readline()):
            assert line, running.stderr.read()
        (id,) = listed(client, "--state", "running")
        assert client.run("prune", "--idle", "0s").stdout == b"removed 0 conversations\n"
        done = client.run("rm", id)
        assert done.stderr.decode() == (
            f"agent-server: conversation {id} is running; rm --force removes it all the same\n"
        )
        assert (done.returncode, done.stdout, listed(client)) == (1, b"", [id])
        done = client.run("rm", "--force", id)
        assert (done.returncode, done.stdout.decode(), listed(client)) == (0, f"removed {id}\n", [])
        assert running.wait(timeout=60) == 1
