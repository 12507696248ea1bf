"""A workspace on this machine keeps the contract, and what only it promises."""

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_sdk.protocol.errors import (
    InvalidParams,
    LimitExceeded,
    NotADirectory,
    OutsideWorkspace,
    PathNotFound,
    PolicyDenied,
    ProcessNotFound,
    StateConflict,
    StorageFull,
    WorkspaceUnavailable,
)
from agent_sdk.workspace.child_process import ChildProcess
from agent_sdk.workspace.disk import Folder
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.output import SPOOL_BYTES, TAIL_BYTES
from agent_sdk.workspace.process_table import ENDED_KEPT, SH, ProcessTable
from tests.contract.commands import HEARS_SIGNALS, PATIENCE, SIGNALS_HEARD, STUBBORN, alive
from tests.contract.shells import CTRL_C, begun
from tests.contract.workspace import OpenWorkspaceContract, WorkspaceContract

MEMORY_BYTES = 64 << 20


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
async def workspace(root):
    async with LocalWorkspace(root) as workspace:
        yield workspace


class TestHere(WorkspaceContract):
    """The contract, on this machine."""


@pytest.mark.elsewhere
class TestBelowTheRootOfAllFiles(OpenWorkspaceContract):
    """The contract, where all of the machine is the root: so it is in a container."""

    @pytest.fixture
    async def workspace(self, root):
        async with LocalWorkspace("/", working_dir=root) as workspace:
            yield workspace


@pytest.fixture
def deaf() -> Iterator[None]:
    """This process is as one that was started in the background of a script, or by a careless supervisor."""
    numbers = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    for number, handler in before.items():
        signal.signal(number, handler)


async def test_what_the_program_ignores_its_commands_hear(deaf, root):
    async with LocalWorkspace(root) as workspace:
        assert (await workspace.execute(HEARS_SIGNALS)).stdout == SIGNALS_HEARD
        process = await workspace.start(HEARS_SIGNALS, pty=True)
        said = b"".join([piece async for piece in process.output()])
        assert said.decode().split() == SIGNALS_HEARD.split()
        shell = workspace.shell()
        await begun(shell, "bash -c 'echo ready; exec sleep 1000'")
        assert (await shell.send(CTRL_C)).exit_code == 130


PROGRAM_OF_MAKE = """
import asyncio
from agent_sdk import LocalWorkspace

async def main():
    async with LocalWorkspace(".") as workspace:
        print((await workspace.execute("echo heard")).stdout)

asyncio.run(main())
"""


async def test_a_program_that_make_has_started_starts_commands(root):
    (root / "program.py").write_text(PROGRAM_OF_MAKE)
    (root / "Makefile").write_text(f"all:\n\t@'{sys.executable}' program.py\n")
    making = await asyncio.create_subprocess_exec("make", "-s", cwd=root, stdout=PIPE, stderr=PIPE)
    said, errors = await making.communicate()
    assert (said.split(), making.returncode) == ([b"heard"], 0), errors.decode()


def living(pid: str) -> bool:
    """Whether this process lives; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] not in "ZX"


# --- entering and leaving ---


async def test_the_root_has_to_exist_and_be_a_folder(root):
    (root / "file").touch()
    for place, error in ((root / "missing", PathNotFound), (root / "file", NotADirectory)):
        with pytest.raises(error):
            await LocalWorkspace(place).__aenter__()


async def test_the_root_is_absolute_and_free_of_symlinks(root, tmp_path, monkeypatch):
    (tmp_path / "alias").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    assert LocalWorkspace("alias").root == str(root)


async def test_the_working_folder_has_to_be_below_the_root(root, tmp_path):
    with pytest.raises(OutsideWorkspace):
        await LocalWorkspace(root, working_dir=tmp_path).__aenter__()
    (root / "sub").mkdir()
    async with LocalWorkspace(root, working_dir="sub") as workspace:
        assert (await workspace.execute("pwd")).stdout == f"{root}/sub\n"
        assert (await workspace.execute("pwd", cwd="..")).stdout == f"{root}\n"


async def test_a_workspace_that_is_not_entered_says_so(root):
    with pytest.raises(WorkspaceUnavailable, match="async with"):
        await LocalWorkspace(root).execute("true")


async def test_a_workspace_is_entered_once_at_a_time(root):
    workspace = LocalWorkspace(root)
    async with workspace:
        with pytest.raises(StateConflict):
            await workspace.__aenter__()
    async with workspace:
        assert (await workspace.execute("echo again")).stdout == "again\n"


async def test_leaving_ends_all_that_runs_and_removes_all_that_was_made(root, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    pids = []
    async with LocalWorkspace(root, spool_dir=tmp_path / "spools") as workspace:
        await workspace.execute("setsid sleep 1000 & echo $! > background")
        await workspace.start("echo $$ > started; sleep 1000")
        await workspace.start("echo $$ > terminal; sleep 1000", pty=True)
        await workspace.shell().run("nohup sleep 1000 >/dev/null 2>&1 & echo $! > job; echo $$ > shell")
        await workspace.shell().run("seq 1 100000; sleep 1000", timeout=0.1)
        await workspace.execute("until [ -s started ] && [ -s terminal ]; do sleep 0.01; done")
        pids = [(root / name).read_text().strip() for name in os.listdir(root)]
    assert len(pids) == 5
    assert not [pid for pid in pids if living(pid)]
    assert os.listdir(tmp_path / "spools") == []
    assert len(os.listdir("/proc/self/fd")) == before


async def test_whoever_asks_git_leaves_nothing_behind(root, tmp_path):
    async with LocalWorkspace(root, spool_dir=tmp_path / "spools") as workspace:
        await workspace.execute("git init -q; touch file; mkdir inner; git -C inner init -q")
        await workspace.git.changes()
        for steps in (1, 2, 4, 8, 16, 32, 64):
            asked = asyncio.create_task(workspace.git.diff())
            for _ in range(steps):
                await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert asked.cancelled()
        await workspace.execute("echo '[core' >> .git/config")
        with pytest.raises(StateConflict):
            await workspace.git.diff()
        assert not [path for path in (tmp_path / "spools").rglob("*") if path.name.startswith("git-")]


async def test_leaving_takes_a_command_that_waits_with_it(root):
    async with LocalWorkspace(root) as workspace:
        running = asyncio.create_task(workspace.execute("touch begun; sleep 1000"))
        await workspace.execute("until [ -e begun ]; do sleep 0.01; done")
    assert (await running).status == "killed"


async def test_leaving_ends_even_what_ignores_it(root):
    async with LocalWorkspace(root) as workspace:
        await workspace.files.write("stubborn", STUBBORN.encode())
        await workspace.execute("setsid bash stubborn >/dev/null & until [ -s pid ]; do sleep 0.01; done")
    assert not living((root / "pid").read_text().strip())


# --- environment ---


async def test_commands_inherit_the_callers_environment_and_what_was_added(root, monkeypatch):
    monkeypatch.setenv("INHERITED", "one")
    async with LocalWorkspace(root, env={"ADDED": "two", "PAGER": "less"}) as workspace:
        result = await workspace.execute("echo $INHERITED $ADDED $PAGER $MINE", env={"MINE": "three"})
        shell = await workspace.shell().run("echo $INHERITED $ADDED $PAGER")
    assert (result.stdout, shell.output.text) == ("one two less three\n", "one two less\n")


async def test_secrets_of_the_server_reach_no_command(root, monkeypatch):
    for name in ("LLM_API_KEY", "AGENT_SERVER_API_KEY", "GIT_DIR"):
        monkeypatch.setenv(name, "canary")
    async with LocalWorkspace(root) as workspace:
        assert "canary" not in (await workspace.execute("env")).stdout
        assert "canary" not in (await workspace.shell().run("env")).output.text


async def test_reserved_names_are_refused_for_the_whole_workspace(root):
    with pytest.raises(PolicyDenied):
        LocalWorkspace(root, env={"AGENT_SERVER_OP": "x"})


# --- floods ---


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def flood(workspace: LocalWorkspace, size: int) -> None:
    """Let a command say very much, while others run, and look at what is kept."""
    before = memory()
    work = asyncio.create_task(workspace.execute(f"yes | head -c {size}"))
    others = 0
    while not work.done():
        assert (await workspace.execute("true")).exit_code == 0
        others += 1
        assert memory() - before < MEMORY_BYTES
    result = await work
    assert others > 10
    assert result.out.size == size
    assert result.out.head + result.out.tail == b"y\n" * ((len(result.out.head) + TAIL_BYTES) // 2)
    kept, offsets = 0, []
    async for offset, data in workspace.process(result.process_id).chunks():
        offsets += [offset] if offset != kept else []
        kept = offset + len(data)
    assert (kept, offsets) == (size, [size - TAIL_BYTES])


async def test_more_output_than_is_kept_costs_neither_memory_nor_others(workspace):
    await flood(workspace, SPOOL_BYTES + (44 << 20))


@pytest.mark.night
async def test_five_gibibytes_of_output_are_counted_exactly(workspace):
    await flood(workspace, 5 << 30)


async def test_a_follower_of_a_flood_gets_all_that_is_kept(workspace):
    process = await workspace.start("seq 1 2000000")
    said = b"".join([piece async for piece in process.output()])
    assert said.endswith(b"\n1999999\n2000000\n")
    assert len(said) == (await workspace.processes())[0].stdout_bytes


# --- processes that have ended ---


async def test_ended_processes_are_kept_for_a_while(workspace):
    first = await workspace.execute("echo first")
    kept = await workspace.start("until [ -e go ]; do sleep 0.01; done")
    for _ in range(ENDED_KEPT):
        last = await workspace.execute("true")
    assert len(await workspace.processes()) == ENDED_KEPT + 1
    assert (await workspace.processes())[0].id == kept.id
    assert (await workspace.process(last.process_id).wait()).exit_code == 0
    with pytest.raises(ProcessNotFound):
        await workspace.process(first.process_id).wait()


async def test_what_a_forgotten_process_left_running_can_still_write(workspace):
    await workspace.execute(
        "(echo $BASHPID > pid; until [ -e go ]; do sleep 0.01; done; seq 1 100000; echo $? > wrote; exec sleep 1000) &"
    )
    for _ in range(ENDED_KEPT + 1):
        await workspace.execute("true")
    await workspace.execute("touch go; until [ -s wrote ]; do sleep 0.01; done")
    assert (await workspace.files.read("wrote")) == b"0\n"
    assert await alive(workspace)


async def test_of_the_output_of_ended_processes_so_much_is_kept_also_when_it_comes_late(root):
    """The first is forgotten when it takes too much disk, though it had written nothing yet when it ended."""
    processes = ProcessTable(str(root), kept_bytes=1000 << 10)
    folder = Folder(os.open(root, os.O_RDONLY), str(root))

    async def run(command: str) -> ChildProcess:
        launch = SH.launch((b"-c", command.encode()), {"PATH": os.defpath})
        child = processes.start(command, launch, folder, stdin=False)
        await child.over
        return child

    late = await run("(while [ ! -e go ]; do sleep 0.01; done; head -c 700k /dev/zero) &")
    await run("head -c 700k /dev/zero; touch go")
    spool = late.spools["stdout"]
    while spool.on_disk < 700 << 10:
        await spool.changed()
    assert len(processes.infos()) == 2
    await run("true")
    assert [info.stdout_bytes for info in processes.infos()] == [700 << 10, 0]
    await processes.end()
    await processes.close()
    folder.close()


# --- files ---


async def test_more_than_64_mebibytes_are_not_read_at_once(workspace):
    await workspace.execute("truncate -s 1T sparse")
    with pytest.raises(LimitExceeded, match="67108864"):
        await workspace.files.read("sparse")
    assert await workspace.files.read("sparse", offset=(1 << 40) - 5) == bytes(5)


async def test_devices_and_sockets_are_no_files(tmp_path):
    async with LocalWorkspace(tmp_path, confined=False) as workspace:
        for path in ("/dev/zero", "/dev/tty", "/proc/self/ns/net"):
            with pytest.raises(OSError):
                await asyncio.wait_for(workspace.files.read(path), PATIENCE)


async def test_an_unconfined_workspace_reaches_every_file(root, tmp_path):
    (tmp_path / "beside").write_text("x")
    async with LocalWorkspace(root, confined=False) as workspace:
        assert await workspace.files.read("../beside") == b"x"
        assert (await workspace.files.stat(str(tmp_path / "beside"))).path == str(tmp_path / "beside")
        assert (await workspace.execute("pwd", cwd="/usr")).stdout == "/usr\n"
        assert not (await workspace.describe()).confined


async def test_what_is_written_belongs_to_whom_it_belonged(workspace, root):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (root / "f").touch()
    os.chown(root / "f", 12345, 12345)
    await workspace.files.write("f", b"x")
    assert (root / "f").stat().st_uid == 12345


@pytest.fixture
def small_disk(root):
    """A file system of 1 MiB at `root`."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs to mount a file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(root)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield root
    subprocess.run(["umount", str(root)], check=True)


async def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(small_disk):
    async with LocalWorkspace(small_disk) as workspace:
        await workspace.files.write("f", b"old")
        with pytest.raises(StorageFull) as caught:
            await workspace.files.write("f", bytes(3 << 20))
        assert caught.value.retryable
        assert await workspace.files.read("f") == b"old"
    assert os.listdir(small_disk) == ["f"]


# --- shells ---


async def test_without_bash_there_is_no_shell_and_sh_runs_commands(root, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to(shutil.which("sh"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    async with LocalWorkspace(root) as workspace:
        assert (await workspace.execute("echo $0")).stdout == "sh\n"
        with pytest.raises(WorkspaceUnavailable, match="bash is needed"):
            await workspace.shell().run("true")


async def test_the_name_of_a_shell_is_a_plain_word(workspace):
    for name in ("", "a/b", "..\0", "x" * 65):
        with pytest.raises(InvalidParams, match="name"):
            workspace.shell(name)


async def test_cancelling_at_any_moment_leaves_a_usable_shell(workspace):
    shell = workspace.shell()
    for turns in range(25):
        work = asyncio.create_task(shell.run(f"sleep 1000; touch never; : {'x' * 2000}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.wait((work,))
    assert (await shell.run("echo free")).output.text.strip() == "free"
    assert (await workspace.execute("ls never")).exit_code != 0


async def test_leaving_answers_a_shell_that_still_runs_something(root):
    async with LocalWorkspace(root) as workspace:
        running = asyncio.create_task(workspace.shell().run("echo begun; touch begun; sleep 1000"))
        await workspace.execute("until [ -e begun ]; do sleep 0.01; done")
    assert (await running).status == "ended"


async def test_commands_do_not_see_how_the_shell_is_driven(workspace):
    result = await workspace.shell().run(
        "ls /proc/self/fd; env | grep -c '^__'; bash --norc -ic 'echo $PROMPT_COMMAND' 2>&1"
    )
    assert result.output.text.split() == ["0", "1", "2", "3", "0"]


async def test_a_shell_that_dies_unseen_is_replaced_where_it_was(workspace):
    shell = workspace.shell()
    await shell.run("mkdir sub; cd sub; export KEPT=1")
    for _ in range(20):  # a death that is not noticed in time is missed in one of three rounds
        await shell.run(f"echo $$ > {workspace.root}/pid")
        await workspace.execute("kill -KILL $(cat pid); while [ -e /proc/$(cat pid) ]; do sleep 0.001; done")
        result = await shell.run("echo $KEPT; basename $PWD")
        assert (result.status, result.output.text) == ("done", "1\nsub\n")
