"""Whatever goes wrong is one sentence on stderr that says what to do, and an exit code that programs can read."""

import json
import socket
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import get_args

import pytest

from agent_sdk.protocol.results import State
from tests.cli.conftest import PROGRAM, Shell

NOWHERE = "http://127.0.0.1:1"
UNKNOWN = "0199d2c8-8a3c-7b60-9d2b-7f4a5e1c0d11"


def test_the_program_itself_says_one_sentence_and_exits_so(shell):
    done = shell.run("ls", AGENT_SERVER_URL=NOWHERE)
    assert sentence(done).endswith("; is the server running there?")
    assert (done.returncode, done.stdout) == (69, b"")


def sentence(done):
    """The one line on stderr, without the program's name."""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("agent-server: ")
    return lines[0].removeprefix("agent-server: ")


USAGE = {
    "no command": ([], "a command is missing; agent-server --help lists them"),
    "a command that is nearly right": (["evnts"], "there is no command 'evnts'; did you mean events?"),
    "a command that is nothing": (
        ["frobnicate"],
        "there is no command 'frobnicate'; agent-server --help lists them",
    ),
    "an option that is not there": (
        ["ls", "--jsn"],
        "unrecognized arguments: --jsn; see agent-server --help",
    ),
    "a missing argument": (
        ["run"],
        "the following arguments are required: TASK; see agent-server run --help",
    ),
    "no number": (
        ["serve", "--port", "http"],
        "argument --port: invalid int value: 'http'; see agent-server serve --help",
    ),
    "a port beyond ports": (
        ["serve", "--port", "65536"],
        "--port must be 1..65535, or 0 for a free one (got 65536)",
    ),
    "a time that is over at once": (
        ["exec", "--timeout", "0", "true"],
        "argument --timeout: '0' is no number of seconds between 0.001 and 86400; see agent-server exec --help",
    ),
    "an id that is none": (
        ["events", "a/b"],
        "argument ID: 'a/b' is no id of a conversation; see agent-server events --help",
    ),
    "the id that makes a conversation": (
        ["attach", "new"],
        "argument ID: 'new' is no id of a conversation; see agent-server attach --help",
    ),
    "a URL that is none": (
        ["ls", "--url", "localhost:8000"],
        "'localhost:8000' is no URL of a server; it looks like http://127.0.0.1:8000",
    ),
    "two servers": (
        ["exec", "--workspace", NOWHERE, "--url", NOWHERE, "true"],
        "--workspace URL and --url name a server each; use one of them",
    ),
    "a conversation of a folder": (
        ["exec", "--workspace", ".", "--conversation", UNKNOWN, "true"],
        "--conversation names a workspace of a server; leave out --workspace, or give it the URL",
    ),
    "a folder of a server that is not named": (
        ["exec", "--working-dir", "/", "true"],
        "--working-dir is a folder of a server's machine; name the server with --workspace URL",
    ),
    "a container and a server": (
        ["exec", "--workspace", "docker:busybox", "--url", NOWHERE, "true"],
        "--workspace docker:IMAGE starts a server of its own; leave out --url and --conversation",
    ),
    "nothing to execute": (
        ["exec"],
        "exec needs one command: a text for bash in quotes (agent-server exec 'ls | wc -l'), "
        "or a program after -- (agent-server exec -- ls -l)",
    ),
    "two files of this machine": (
        ["cp", "a", "b"],
        "one of SRC and DST is a path in the workspace and starts with `:`, the other is a path of this machine, "
        "e.g. agent-server cp data.csv :in/data.csv",
    ),
    "no model": (
        ["run", "task"],
        "no model is named; use --model or set LLM_MODEL (e.g. openai/gpt-5.5, its key in LLM_API_KEY), "
        "or use --script FILE",
    ),
    "a model and a script": (
        ["run", "task", "--model", "openai/gpt-5.5", "--script", "x"],
        "--script and --model contradict each other; use one of them",
    ),
    "an option of the server that is not there": (
        ["serve", "--config", "{config}"],
        "{config}:2:1: server.prot is no option; did you mean port?",
    ),
    "a state that is none": (
        ["ls", "--state", "nope"],
        f"argument --state: invalid choice: 'nope' (choose from {', '.join(map(repr, get_args(State)))}); "
        "see agent-server ls --help",
    ),
    "a tag without a value": (
        ["ls", "--tag", "team"],
        "argument --tag: 'team' is no tag; write NAME=VALUE; see agent-server ls --help",
    ),
    "a tag twice": (
        ["ls", "--tag", "team=red", "--tag", "team=blue"],
        "--tag: a NAME is given twice, and no conversation has two values of it",
    ),
    "a pipe without a name": (
        ["cp", "-", ":in/"],
        "standard input has no name; name the file, e.g. agent-server cp - :in/data.csv",
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_exit_code_2(perform, tmp_path, script, case):
    words, wanted = USAGE[case]
    config = tmp_path / "typo.toml"
    config.write_text("[server]\nprot = 8000\n")
    done = perform(*(word.format(script=script, config=config) for word in words))
    assert (sentence(done), done.returncode, done.stdout) == (wanted.replace("{config}", str(config)), 2, b"")


FILES = {
    "a file that is not there": (["cp", "nowhere.txt", ":x"], "nowhere.txt"),
    "a file that is not in the workspace": (
        ["cp", ":nowhere.txt", "x"],
        "No such file or directory: nowhere.txt",
    ),
    "a folder on a file": (["cp", "folder", ":script.json"], "Not a directory: script.json"),
    "a folder of the workspace on a file": (["cp", ":folder", "script.json"], "not a folder: script.json"),
    "a folder into a pipe": (
        ["cp", ":folder", "-"],
        "folder is a folder, which standard output does not take",
    ),
    "a path that leads out": (["cp", ":../secret", "x"], "the path leads out of the workspace: ../secret"),
    "a workspace that is not there": (
        ["exec", "--workspace", "nowhere", "true"],
        "nowhere: no such folder; --workspace takes a folder, a server's URL or docker:IMAGE",
    ),
    "a workspace that is a file": (
        ["exec", "--workspace", "script.json", "true"],
        "script.json: not a folder; --workspace takes a folder, a server's URL or docker:IMAGE",
    ),
    "a script that is not there": (["run", "task", "--script", "no.json"], "no.json: no such script file"),
    "a key file that is not there": (["ls", "--api-key-file", "no.key"], "no.key: no such API key file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_exit_code_1(perform, tmp_path, script, case):
    words, wanted = FILES[case]
    (tmp_path / "folder").mkdir()
    done = perform(*words)
    assert wanted in sentence(done)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"step": "sing"}]', '[{"step": "say"}]', "\udcff", "[" * 9999]
)
def test_a_script_that_is_none_is_told_with_an_example(perform, tmp_path, text):
    (tmp_path / "no.json").write_bytes(text.encode(errors="surrogateescape"))
    done = perform("run", "task", "--script", "no.json")
    assert sentence(done).startswith("no.json is no script: ")
    assert sentence(done).endswith(
        '; a script is a JSON list of steps like [{"step": "say", "text": "Done."}]'
    )
    assert done.returncode == 2


CLIENTS = {
    "ls": ["ls"],
    "events": ["events", UNKNOWN],
    "attach": ["attach", UNKNOWN],
    "exec": ["exec", "--conversation", UNKNOWN, "true"],
    "cp": ["cp", "--conversation", UNKNOWN, ":a", "b"],
    "run": ["run", "task", "--conversation", UNKNOWN],
    "rm": ["rm", UNKNOWN],
    "prune": ["prune", "--idle", "0s"],
    "health": ["health"],
}


@pytest.mark.parametrize("words", CLIENTS.values(), ids=CLIENTS)
def test_a_server_that_is_not_there_is_exit_code_69(perform, words):
    done = perform(*words, AGENT_SERVER_URL=NOWHERE)
    *waiting, last = done.stderr.decode().splitlines()
    problem = f"agent-server: cannot reach {NOWHERE}: Connection refused; is the server running there?"
    assert (last, done.returncode) == (problem, 69)
    assert waiting in ([], [f"{problem} (trying again)"])


@pytest.fixture(scope="module")
def suspicious_server(tmp_path_factory):
    """A server of this file: one that has seen five wrong keys looks at no further ones for a minute."""
    shell = Shell(tmp_path_factory.mktemp("suspicious"))
    with shell.start("serve", "--port", "0", "--json", stderr=None) as process:
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()


@pytest.mark.parametrize("command", ["ls", "events", "exec", "run"])
def test_a_wrong_key_is_exit_code_77(perform, suspicious_server, command):
    done = perform(*CLIENTS[command], "--url", suspicious_server, "--api-key", "wrong-key-wrong-key")
    mend = "pass the server's key with --api-key-file, --api-key or AGENT_SERVER_API_KEY"
    assert sentence(done).endswith(f"; {mend}")
    assert done.returncode == 77


def test_no_key_at_all_is_exit_code_77(client):
    done = client.run("ls", AGENT_SERVER_API_KEY="")
    assert "an API key is needed" in sentence(done)
    assert done.returncode == 77


@pytest.mark.parametrize(
    "words", [CLIENTS["events"], CLIENTS["attach"], CLIENTS["exec"]], ids=["events", "attach", "exec"]
)
def test_a_conversation_that_is_not_there_is_exit_code_1(perform, running_server, words):
    server = {"AGENT_SERVER_URL": running_server.url, "AGENT_SERVER_API_KEY": running_server.api_key}
    done = perform(*words, **server)
    assert sentence(done).endswith("no such conversation; agent-server ls shows those there are")
    assert done.returncode == 1


class SomethingElse(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def something_else():
    with HTTPServer(("127.0.0.1", 0), SomethingElse) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("words", [CLIENTS["ls"], CLIENTS["events"]], ids=["ls", "events"])
def test_a_server_of_another_kind_is_exit_code_69(perform, something_else, words):
    done = perform(*words, AGENT_SERVER_URL=something_else)
    assert sentence(done).startswith(f"{something_else} is no agent server")
    assert done.returncode == 69


def test_a_missing_program_is_exit_code_127(shell):
    done = shell.run("exec", "--", "no-such-program")
    assert "no-such-program" in sentence(done)
    assert done.returncode == 127


def test_a_port_in_use_is_exit_code_75(shell):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = shell.run("serve", "--port", str(port))
    assert sentence(done) == (
        f"cannot listen on 127.0.0.1:{port}: the port is in use; choose another with --port, 0 takes a free one"
    )
    assert done.returncode == 75


def test_a_data_folder_in_use_is_exit_code_75(shell, running_server):
    done = shell.run("serve", "--port", "0", "--data", str(running_server.data))
    assert "belongs to a running server" in sentence(done)
    assert sentence(done).endswith("; stop it or choose another with --data")
    assert done.returncode == 75


@pytest.mark.parametrize("place", ["a-file/data", "/proc/agent-server"])
def test_a_data_folder_that_cannot_be_written_is_exit_code_73(shell, place):
    (shell.folder / "a-file").touch()
    done = shell.run("serve", "--port", "0", "--data", place)
    assert "cannot be written" in sentence(done)
    assert sentence(done).endswith("; choose another with --data")
    assert done.returncode == 73


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed_lead_nowhere(client, closed):
    for words in (["ls"], ["--version"], ["exec", "-i", "cat"]):
        done = redirected(client, words, closed)
        assert (done.returncode, done.stderr) == (0, b""), words


def redirected(user, words, where):
    command = ["sh", "-c", f'exec "$@" {where}', "sh", *PROGRAM, *words]
    return subprocess.run(
        command, env=user.environ, cwd=user.folder, capture_output=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", [["--version"], ["config"]], ids=["version", "config"])
def test_output_that_does_not_fit_is_exit_code_1(shell, words):
    done = redirected(shell, words, ">/dev/full")
    assert (done.returncode, sentence(done)) == (1, "No space left on device")


def test_control_characters_in_an_error_cannot_drive_the_terminal(perform):
    done = perform("exec", "--workspace", "\x1b[2J\nagent-server: all is well", "true")
    assert "\\x1b[2J agent-server: all is well: no such folder" in sentence(done)
