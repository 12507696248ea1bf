"""agent-server run: one conversation to its end, here and there."""

import json
import signal

import pytest


@pytest.fixture(params=["here", "there"])
def run(request, client, tmp_path):
    """The words that start `run` in a folder of this machine, and in a fresh workspace of a server."""
    where = str(tmp_path) if request.param == "here" else client.environ["AGENT_SERVER_URL"]
    return ["run", "Say hello", "--workspace", where]


def kinds(done):
    return [json.loads(line)["type"] for line in done.stdout.splitlines()]


def test_a_finished_turn_is_exit_code_0(client, run, script):
    done = client.run(*run, "--script", script)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode()
    assert "you: Say hello\n" in said
    assert "  > $ echo hello | tee said.txt\n    hello\n" in said
    assert "agent: It says hello.\n[finished - 2 steps" in said


def test_the_work_is_done_in_the_folder(client, script):
    assert client.run("run", "Say hello", "--script", script).returncode == 0
    assert (client.folder / "said.txt").read_text() == "hello\n"


def test_programs_get_the_same_events_here_and_there(client, tmp_path, script):
    here = client.run("run", "Say hello", "--script", script, "--json")
    url = client.environ["AGENT_SERVER_URL"]
    there = client.run("run", "Say hello", "--script", script, "--json", "--workspace", url)
    assert [kind for kind in kinds(there) if kind != "workspace_changed"] == kinds(here)
    assert kinds(here)[-1] == "turn_ended"


def test_a_turn_that_reached_its_limit_is_exit_code_1(client, run, script):
    done = client.run(*run, "--script", script, "--max-iterations", "1", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "limit"


def test_a_turn_that_failed_is_exit_code_1(client, run):
    (client.folder / "fail.json").write_text('[{"step": "fail", "error": "model_refused", "message": "no"}]')
    done = client.run(*run, "--script", "fail.json", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"] == "model_refused"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_it_stops_the_turn_on_the_server_too(client, hanging, number):
    url = client.environ["AGENT_SERVER_URL"]
    with client.start("run", "x", "--script", hanging, "--json", "--workspace", url) as process:
        first = json.loads(process.stdout.readline())
        while json.loads(process.stdout.readline())["type"] != "turn_started":
            pass
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
        assert process.stderr.read() == b""
    events = client.run("events", first["conversation"], "--json")
    assert kinds(events)[-1] == "turn_ended"
    assert json.loads(events.stdout.splitlines()[-1])["status"] == "interrupted"


def test_stopping_it_here_leaves_quietly(shell, hanging):
    with shell.start("run", "x", "--script", hanging, "--json") as process:
        while json.loads(process.stdout.readline())["type"] != "turn_started":
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b""


def test_a_reader_that_leaves_ends_it(shell, hanging):
    (shell.folder / "calls.json").write_text(
        '[{"step": "call", "tool": "think", "arguments": {"thought": "%s"}}]' % ("x" * 100_000)
    )
    with shell.start("run", "x", "--script", "calls.json", "--json") as process:
        process.stdout.close()
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_a_conversation_can_be_continued_with_the_agent_it_has(client, tmp_path):
    (tmp_path / "two.json").write_text('[{"step": "say", "text": "one"}, {"step": "say", "text": "two"}]')
    url = client.environ["AGENT_SERVER_URL"]
    first = client.run("run", "a", "--script", "two.json", "--json", "--workspace", url)
    conversation = json.loads(first.stdout.splitlines()[0])["conversation"]
    second = client.run("run", "b", "--conversation", conversation)
    assert (second.returncode, second.stderr) == (0, b"")
    assert second.stdout.decode().startswith("you: b\nagent: two\n[finished")
