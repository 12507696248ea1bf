"""agent-server serve, and what programs and people read when it is ready."""

import json
import signal
import stat
from pathlib import Path


def test_one_line_of_json_says_where_it_is(shell):
    with shell.start("serve", "--port", "0", "--json", "--data", "data") as process:
        ready = json.loads(process.stdout.readline())
        process.terminate()
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == b""
    key = Path(ready["api_key_file"])
    assert ready == {
        "url": ready["url"],
        "api_key_file": str(shell.folder / "data" / "api_key"),
        "pid": process.pid,
    }
    assert ready["url"].startswith("http://127.0.0.1:")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_text().strip()) >= 40


def test_people_are_told_where_it_is_and_where_the_key_is(shell):
    with shell.start("serve", "--port", "0") as process:
        said = [process.stdout.readline().decode() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert said[0].startswith("The agent server is ready at http://127.0.0.1:")
    assert said[1] == f"Its API key is in {shell.folder}/.local/share/agent-server/api_key\n"


def test_a_client_of_the_same_user_finds_the_key_by_itself(shell):
    with shell.start("serve", "--port", "0", "--json") as process:
        url = json.loads(process.stdout.readline())["url"]
        done = shell.run("ls", "--url", url)
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert (done.stdout, done.stderr, done.returncode) == (b"no conversations yet\n", b"", 0)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(shell):
    (shell.folder / "server.toml").write_text('[server]\nport = 1\nlog_format = "console"\n')
    shell.environ["AGENT_SERVER_PORT"] = "2"
    with shell.start("serve", "--config", "server.toml", "--port", "0", "--json") as process:
        url = json.loads(process.stdout.readline())["url"]
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert not url.endswith((":1", ":2"))
    assert "server_started" in log.decode()
    assert not log.startswith(b"{")
