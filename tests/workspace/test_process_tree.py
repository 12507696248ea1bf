"""All processes of an operation are found and ended, and no others."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent_sdk import LocalWorkspace
from agent_sdk.workspace.environment import workspace_environment
from agent_sdk.workspace.launch import Launch, open_folder
from agent_sdk.workspace.paths import Root
from agent_sdk.workspace.pipes import open_terminal
from agent_sdk.workspace.process_table import ProcessTable
from agent_sdk.workspace.process_tree import Tree, end_tree, find
from tests.pidfds import without_pidfds

GRACE = 0.3

DETACHED = """
import os, signal, sys, time
clean = {"PATH": os.environ["PATH"]}
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
while True: time.sleep(100)
"""


@pytest.fixture
async def processes(tmp_path):
    processes = ProcessTable(str(tmp_path))
    yield processes
    await processes.end()


@pytest.fixture
async def run(tmp_path, processes):
    """Starts bash text and waits until it has made the file `ready`."""
    folder = open_folder(Root(str(tmp_path)), ".")

    async def run(text: str, argv: tuple[bytes, ...] = ()):
        launch = Launch(argv or (b"bash", b"-c", text.encode()), workspace_environment())
        child = processes.spawn(launch, folder)
        await asyncio.to_thread(until_exists, tmp_path / "ready")
        return child

    yield run
    folder.close()


def until_exists(path: Path) -> None:
    command = ["bash", "-c", 'until [ -s "$0" ]; do sleep 0.01; done', str(path)]
    subprocess.run(command, check=True, timeout=30)


def living(path: Path) -> bool:
    """Whether the process lives whose number is in this file."""
    try:
        text = Path(f"/proc/{path.read_text().strip()}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
def bystander():
    """A process of this machine that has nothing to do with it."""
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "text",
    [
        "echo $$ > ready; sleep 1000",
        "bash -c 'echo $$ > ready; sleep 1000; true'; true",
        "setsid bash -c 'echo $$ > ready; sleep 1000; true' & wait",
        "(setsid bash -c '(echo $BASHPID > ready; sleep 1000; true) & wait' &) ; sleep 1000",
        "env -i setsid bash -c 'echo $$ > ready; sleep 1000; true' & wait",
        "(env -i bash -c 'echo $$ > ready; sleep 1000; true' &) ; sleep 1000",
        "trap '' TERM HUP INT QUIT; echo $$ > ready; while :; do sleep 1; done",
        "echo $$ > ready; kill -STOP $$",
        "trap 'setsid sleep 1000 & echo $! > ready; wait' TERM; echo $$ > ready; while :; do sleep 0.01; done",
    ],
)
async def test_nobody_gets_away(run, tmp_path, text):
    child = await run(text)
    assert living(tmp_path / "ready")
    child.end("timeout", grace=GRACE)
    await child.ended()
    assert not living(tmp_path / "ready")
    assert (child.exit.status, child.exit.exit_code) == ("timeout", None)


async def test_a_daemon_that_ignores_term_is_found_by_its_marker(run, tmp_path):
    child = await run("", (sys.executable.encode(), b"-c", DETACHED.encode(), b"ready"))
    await child.over
    assert living(tmp_path / "ready")
    child.end(grace=GRACE)
    await child.ended()
    assert not living(tmp_path / "ready")
    assert child.exit.exit_code == 0


async def test_a_process_that_never_stops_forking_is_ended(run, tmp_path):
    child = await run("while :; do setsid sleep 1000 & echo $! > ready; sleep 0.005; done")
    child.end(grace=GRACE)
    await child.ended()
    marker = f"AGENT_SERVER_OP={child.id}\0".encode()
    assert find(Tree(marker)) == set()


async def test_those_who_end_in_time_are_not_killed(run, tmp_path):
    child = await run("trap 'echo clean > left; exit 3' TERM; echo > ready; while :; do sleep 0.01; done")
    child.end()
    await child.ended()
    assert (tmp_path / "left").read_text() == "clean\n"
    assert child.exit.exit_code == 3


async def test_a_program_that_was_only_just_given_a_terminal_ends_by_the_first_signal(tmp_path):
    """Whoever keeps its terminal outlives signals: they must not come before the program is there."""
    processes, ends = ProcessTable(str(tmp_path)), set()
    folder = open_folder(Root(str(tmp_path)), ".")
    for nth in range(30):
        terminal = open_terminal(24, 80)
        launch = Launch((b"sleep", b"1000"), workspace_environment(), terminal=terminal.name)
        child = processes.spawn(launch, folder)
        for _ in range(nth % 5):  # each as far as the loop has come
            await asyncio.to_thread(os.sched_yield)
        child.end(hang_up=True)
        await child.ended()
        ends.add(child.exit.signal)
        terminal.close_slave()
        os.close(terminal.master)
    folder.close()
    await processes.end()
    assert ends <= {signal.SIGHUP, signal.SIGTERM}


async def test_processes_of_others_are_left_alone(bystander):
    await end_tree(Tree(b"AGENT_SERVER_OP=nobody-", {bystander.pid: 1}), grace=GRACE)
    assert bystander.poll() is None


def test_a_recycled_number_of_an_ended_leader_means_nothing(bystander):
    nobody = b"AGENT_SERVER_OP=nobody-"
    assert find(Tree(nobody, {bystander.pid: 1})) == set()
    assert {seen.pid for seen in find(Tree(nobody, {bystander.pid: None}))} == {bystander.pid}


async def test_the_number_of_a_leader_is_its_own_only_until_it_was_waited_for(run, processes, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    child = await run("echo > ready; read < fifo")
    told = asyncio.get_running_loop().create_future()
    child.on_death = lambda: told.set_result(processes.leaders[child.pid])
    assert processes.leaders[child.pid] is None
    await asyncio.to_thread((tmp_path / "fifo").write_text, "go\n")
    async with asyncio.timeout(30):
        assert await told is not None


def test_this_process_never_belongs_to_a_tree():
    assert os.getpid() not in {seen.pid for seen in find(Tree(b"", {}))}


async def test_cancelling_does_not_stop_the_ending(run, tmp_path):
    child = await run("trap '' TERM; echo $$ > ready; while :; do sleep 1; done")
    child.end(grace=GRACE)
    ended = asyncio.create_task(child.ended())
    await asyncio.sleep(0)
    ended.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ended
    assert not living(tmp_path / "ready")


PIDFD_SEND_SIGNAL, PIDFD_OPEN = 424, 434
WAITING = """
refuse_pidfds(434, 1)

async def main():
    async with LocalWorkspace() as workspace:
        result = await asyncio.wait_for(workspace.execute("echo said; exit 9"), 30)
        print(result.stdout.strip(), result.exit_code)

asyncio.run(main())
"""


def test_where_pidfds_are_refused_a_thread_waits(tmp_path):
    assert without_pidfds(tmp_path, WAITING) == ["refused 1", "said 9"]


ENDING = """
refuse_pidfds(*map(int, sys.argv[1:]))

async def main():
    async with LocalWorkspace() as workspace:
        command = "trap '' TERM; setsid sleep 1000 & echo $! > pid; wait; wait"
        result = await asyncio.wait_for(workspace.execute(command, timeout=0.3), 30)
        print(result.status)
    async with LocalWorkspace() as workspace:
        began = time.monotonic()
        await workspace.start("sleep 1000 & echo $! > second; wait")
        while not os.path.exists("second") or not os.path.getsize("second"):
            await asyncio.sleep(0.01)
    print("at once" if time.monotonic() - began < 4 else "after the whole grace")

asyncio.run(main())
"""


@pytest.mark.parametrize("errno", [1, 38, 24])
@pytest.mark.parametrize("call", [PIDFD_OPEN, PIDFD_SEND_SIGNAL])
def test_where_pidfds_are_refused_all_is_ended_all_the_same(tmp_path, call, errno):
    said = without_pidfds(tmp_path, ENDING, call, errno)
    assert [line for line in said if not line.startswith("refused")] == ["timeout", "at once"]
    assert not living(tmp_path / "pid")
    assert not living(tmp_path / "second")


WITHOUT_DESCRIPTORS = """
from agent_sdk.workspace.environment import workspace_environment
from agent_sdk.workspace.launch import Launch, open_folder
from agent_sdk.workspace.paths import Root
from agent_sdk.workspace.process_table import ProcessTable

async def main():
    processes = ProcessTable(os.getcwd())
    text = b"trap '' TERM; sleep 1000 & echo $! > pid; wait; wait"
    child = processes.spawn(Launch((b"sh", b"-c", text), workspace_environment()), open_folder(Root("."), "."))
    while not os.path.exists("pid") or not os.path.getsize("pid"):
        await asyncio.sleep(0.01)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + int(sys.argv[1]), limit[1]))
    child.end(grace=0.1)
    exit = await asyncio.wait_for(child.over, 30)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    print(exit.status, exit.signal)

asyncio.run(main())
"""


@pytest.mark.parametrize("free", [0, 1, 2])
def test_where_descriptors_are_out_a_process_is_ended_all_the_same(tmp_path, free):
    assert without_pidfds(tmp_path, WITHOUT_DESCRIPTORS, free) == ["killed 9"]
    assert not living(tmp_path / "pid")


async def test_an_exit_code_that_somebody_else_took_is_unknown(run, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    child = await run("echo > ready; read < fifo")
    take_exit_code(tmp_path / "fifo", child.pid)
    async with asyncio.timeout(30):
        exit = await child.over
    assert (exit.status, exit.exit_code) == ("unknown", None)


def take_exit_code(fifo: Path, pid: int) -> None:
    """Let the process end and wait for it before the loop gets a turn."""
    fifo.write_text("go\n")
    os.waitpid(pid, 0)


async def test_a_shell_whose_command_is_ended_does_not_go_on_with_the_next(tmp_path):
    async with LocalWorkspace(tmp_path) as workspace:

        async def one() -> str:
            return (await workspace.execute("sleep 1000; echo next", timeout=0.3)).stdout

        for _ in range(5):
            assert set(await asyncio.gather(*(one() for _ in range(20)))) == {""}
