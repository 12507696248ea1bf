"""agent-server exec: bytes and exit codes pass through, here and there alike."""

import signal
from pathlib import Path

import pytest

EVERY_BYTE = bytes(range(256))


@pytest.fixture(params=["here", "there"])
def execute(request, client, tmp_path):
    """Runs `exec` in a folder of this machine, and in a fresh workspace of a server."""
    where = str(tmp_path) if request.param == "here" else client.environ["AGENT_SERVER_URL"]

    def run(*words, **options):
        return client.run("exec", "--workspace", where, *words, **options)

    return run


def runs(pid):
    """Whether the process is there and more than an entry in the table that nobody has read yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_byte_passes_on_both_streams(execute):
    octal = "".join(f"\\{byte:03o}" for byte in EVERY_BYTE)
    done = execute(f"printf '{octal}'; printf '{octal}' >&2; exit 3")
    assert (done.stdout, done.stderr, done.returncode) == (EVERY_BYTE, EVERY_BYTE, 3)


def test_a_program_gets_its_arguments_as_they_are(execute):
    done = execute("--", "printf", "%s|", "a b", "$HOME", "--", "-n", "*")
    assert (done.stdout, done.returncode) == (b"a b|$HOME|--|-n|*|", 0)


def test_a_text_is_run_by_bash(execute):
    assert execute("set -o pipefail; false | true; echo ${PIPESTATUS[0]}").stdout == b"1\n"


def test_much_output_arrives_whole(execute):
    done = execute("head -c 20000000 /dev/zero")
    assert (len(done.stdout), done.stdout.strip(b"\0")) == (20_000_000, b"")


def test_standard_input_is_given_when_asked_for(execute):
    assert execute("-i", "--", "cat", stdin=EVERY_BYTE).stdout == EVERY_BYTE


def test_standard_input_stays_untouched_otherwise(execute):
    assert execute("--", "cat", stdin=b"not for you").stdout == b""


def test_a_command_that_a_signal_ended_exits_as_in_a_shell(execute):
    done = execute("kill -USR1 $$")
    assert (done.stderr, done.returncode) == (b"", 128 + signal.SIGUSR1)


def test_a_command_whose_time_is_over_exits_with_124(execute):
    done = execute("--timeout", "0.2", "echo before; sleep 1000")
    assert (done.stdout, done.returncode) == (b"before\n", 124)
    assert done.stderr == b"agent-server: the command was ended after 0.2 s; --timeout gives it more time\n"


def test_a_reader_that_leaves_ends_the_command(shell):
    with shell.start("exec", "--", "yes") as process:
        assert process.stdout.read(2) == b"y\n"
        process.stdout.close()
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_it_ends_the_command_with_all_it_started(shell, number):
    with shell.start("exec", "sleep 1000 & echo $!; wait") as process:
        child = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
        assert process.stderr.read() == b""
    assert not runs(child)


def test_under_nohup_it_outlives_its_terminal(shell):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = shell.run("exec", "kill -HUP $PPID; sleep 0.3; echo end")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (done.stdout, done.returncode) == (b"end\n", 0)


def test_stopping_it_ends_a_command_on_a_server_too(client):
    where = client.environ["AGENT_SERVER_URL"]
    with client.start("exec", "--workspace", where, "echo $$; exec sleep 1000") as process:
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT
    assert not runs(child)


def test_a_folder_of_the_server_can_be_the_workspace(client, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    where = ["--workspace", client.environ["AGENT_SERVER_URL"], "--working-dir", str(folder)]
    assert client.run("exec", *where, "pwd").stdout.decode() == f"{folder}\n"


def test_its_output_can_go_to_a_file(shell, tmp_path):
    with (tmp_path / "out").open("wb") as file, shell.start("exec", "echo x", stdout=file) as process:
        assert process.wait(timeout=30) == 0
    assert (tmp_path / "out").read_bytes() == b"x\n"
