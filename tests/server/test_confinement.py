"""Boxes that are other users, or in namespaces of their own: what they may do, and how they end."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import IsolationUnavailable, PathDenied
from agent_sdk.remote.workspace import RemoteWorkspace
from tests.conftest import let_others_through
from tests.contract.workspace import WorkspaceContract
from tests.docker.test_attacks import attacked
from tests.server.test_box_process import cancelled_after
from workspaces.box.confinement import NOT_CONFINED, Confinement, confinement
from workspaces.box.process import BoxProcess
from workspaces.box.runtime import MOUNT, BoxRuntime

BOX_USER = 10_001

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A server's data folder, as a server opens it to its boxes."""
    folder = tmp_path_factory.mktemp("data")
    let_others_through(folder)
    for name in ("workspaces", "output", "runtime"):
        (folder / name).mkdir(mode=0o711)
    (folder / "boxes").mkdir(mode=0o700)
    return folder


@pytest.fixture
async def confined(data, isolation):
    if shutil.which("bwrap") is None and isolation == "bwrap" and not os.environ.get("CONTAINERS_REQUIRED"):
        pytest.skip("needs bubblewrap")
    made = await confinement(isolation, BOX_USER, data)
    await made.check(data)
    return made


@pytest.fixture
async def box(data, confined):
    owner = new_id()
    root = data / "workspaces" / owner
    confined.give(root)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TESTS_RUN": os.environ["TESTS_RUN"]}
    yield BoxProcess(
        root,
        data / "boxes" / owner,
        spool=data / "output" / owner,
        environment=environment,
        confinement=confined,
    )
    confined.remove(root)


@pytest.fixture
async def workspace(box):
    async with box, RemoteWorkspace(box.url, box.token) as workspace:
        yield workspace


@pytest.fixture
def neighbour(data, confined):
    """The workspace of somebody else, with a file in it."""
    folder = data / "workspaces" / new_id()
    confined.give(folder)
    (folder / "file").write_text("a neighbour's")
    yield folder
    confined.remove(folder)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@as_root
@pytest.mark.elsewhere
@pytest.mark.parametrize("isolation", ["user"])
class TestAsAnotherUser(WorkspaceContract):
    pass


@as_root
@pytest.mark.elsewhere
@pytest.mark.parametrize("isolation", ["bwrap"])
class TestInNamespaces(WorkspaceContract):
    pass


both = pytest.mark.parametrize("isolation", ["user", "bwrap"])
in_namespaces = pytest.mark.parametrize("isolation", ["bwrap"])


@as_root
@both
async def test_a_command_is_another_user_without_any_capability(workspace):
    status = (await workspace.execute("cat /proc/self/status")).stdout
    found = dict(line.split(":", 1) for line in status.splitlines())
    assert found["Uid"].split() == found["Gid"].split() == [str(BOX_USER)] * 4
    assert {name: int(value, 16) for name, value in found.items() if name.startswith("Cap")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0
    )
    assert found["Groups"].split() == []
    assert found["NoNewPrivs"].strip() == "1"


MAY = """
run_a_program_in_run run_a_program_in_dev_shm call_clock_settime raise_core raise_file_size raise_descriptors
raise_processes raise_locked_memory
"""
ALLOWED = {
    "bwrap": f"{MAY} call_setuid_0 call_setgid_0",  # there is no such user in there
    "user": f"""{MAY}
make_a_folder_elsewhere list_firmware list_acpi list_scsi read_timer_list read_slabinfo read_sched_debug read_keys
open_device_fuse open_device_net_tun open_device_kvm open_device_vsock see_strangers connect_to_abstract_sockets
reach_a_service_of_the_host reach_metadata reach_the_internet have_a_route have_an_interface ask_for_a_name
greet_neighbours
""",
}
"""What commands that are another user may: they see the machine, its network, and that there is a server."""


@as_root
@both
async def test_no_attack_reaches_the_server_or_whoever_else_is_there(
    workspace, box, data, confined, isolation
):
    secret, secret_file = secrets.token_hex(), data / "secret"
    secret_file.write_text(secret)
    secret_file.chmod(0o600)
    runtime = BoxRuntime(confined.runtime)
    where = MOUNT if isolation == "bwrap" else str(runtime.path)
    python = [
        word for word in runtime.python(where) if word != "-I"
    ]  # what is attacked with is in this folder
    given = {
        "host_file": str(secret_file),
        "others": [str(secret_file)],
        "box": str(box.folder),
        "search": [str(data)],
    }
    given["boxes"] = [(await workspace.describe()).pid]  # that of bwrap, its first process, holds nothing
    through = await attacked(workspace, python, canary=secret[::-1], **given)
    assert through.keys() - set(ALLOWED[isolation].split()) == set()


@as_root
@both
@pytest.mark.parametrize(
    "attempt",
    [
        "cat {data}/secret",
        "ls {data} | grep -vx -e output -e workspaces",
        "ls {data}/workspaces | grep -vx {owner}",
        "ls {data}/boxes",
        "cat {data}/boxes/{owner}/box.json",
        "rm {data}/boxes/{owner}/box.sock",
        "touch {data}/planted",
        "touch {data}/workspaces/planted",
        "mv {data}/workspaces/{owner} {data}/workspaces/other",
        "tr '\\0' '\\n' </proc/{server}/environ",
        ": </proc/{server}/mem",
        "cat /proc/{server}/maps | grep .",
        "ls /proc/{server}/fd/",
        "kill -0 {server}",
        "kill -9 {server}",
        "su root -c true",
        "cat /etc/shadow",
        "touch /usr/planted",
    ],
)
async def test_a_command_cannot_reach_what_is_the_servers(workspace, box, data, attempt):
    (data / "secret").write_text("secret")
    (data / "secret").chmod(0o600)
    tried = attempt.format(data=data, owner=box.folder.name, server=os.getpid())
    assert (await workspace.execute(tried)).exit_code not in (0, None)


@as_root
@both
async def test_the_environment_of_the_server_does_not_lead_its_boxes_to_its_own_folders(data, confined):
    root = data / "workspaces" / new_id()
    confined.give(root)
    given = {"PATH": os.defpath, "HOME": "/root", "USER": "root", "TMPDIR": "/root/tmp"}
    async with (
        BoxProcess(root, data / "boxes" / root.name, environment=given, confinement=confined) as box,
        RemoteWorkspace(box.url, box.token) as workspace,
    ):
        said = await workspace.execute('echo "$HOME $USER ${TMPDIR-none}"; touch "$HOME/file" && umask')
    assert said.stdout.split() == [str(root), "agent", "none", "0022"]
    confined.remove(root)


@as_root
@both
async def test_it_says_how_it_is_confined(box, workspace, isolation):
    assert (await box.completed(await workspace.describe())).isolation == isolation


@as_root
@both
async def test_what_runs_in_a_confined_box_that_is_killed_is_ended(box):
    async with box, RemoteWorkspace(box.url, box.token) as workspace:
        await workspace.execute("setsid sleep 600 >/dev/null 2>&1 & setsid -f sleep 601")
        inside = psutil.Process(box.pid).children(recursive=True)
        # Those that end meanwhile have no user any more.
        running = [
            p.pid for p in psutil.process_iter(["uids"]) if (u := p.info["uids"]) and u.real == BOX_USER
        ]
        os.kill(box.pid, signal.SIGKILL)
    assert running
    assert [gone(pid) for pid in running if psutil_marked(pid, box.instance)] == []
    assert all(gone(child.pid) for child in inside)


@as_root
@both
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 13])
async def test_the_start_of_a_confined_box_can_be_cancelled_at_every_step(box, steps):
    await cancelled_after(steps, box)


def psutil_marked(pid: int, instance: str) -> bool:
    try:
        return instance.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


@as_root
@in_namespaces
async def test_in_namespaces_nothing_escapes_its_end(box, confined):
    """Not even what has another session, another parent and no environment."""
    hide = "env -i setsid sh -c 'sleep 600 & exec sleep 600' >/dev/null 2>&1 &"
    async with box, RemoteWorkspace(box.url, box.token) as workspace:
        await workspace.execute(f"{hide} until [ $(pgrep -c sleep) = 2 ]; do :; done")
        inside = psutil.Process(box.pid).children(recursive=True)
        assert sum(child.name() == "sleep" for child in inside) == 2
    assert all(gone(child.pid) for child in inside)


@as_root
@both
async def test_a_confined_box_whose_starter_was_killed_before_it_wrote_the_pid_is_ended(box, confined):
    await box.start()
    box.let_go()
    inside = [box.pid, *(child.pid for child in psutil.Process(box.pid).children(recursive=True))]
    record = box.folder / "box.json"
    record.write_bytes(
        msgspec.json.encode({**msgspec.json.decode(record.read_bytes()), "pid": 0, "ticks": 0})
    )
    assert await BoxProcess.find(box.folder, confinement=confined) is None
    assert all(gone(pid) for pid in inside)


@as_root
@both
async def test_commands_of_a_confined_box_are_asked_to_end_before_they_are_killed(box):
    async with box, RemoteWorkspace(box.url, box.token) as workspace:
        process = await workspace.start("trap 'echo asked >asked; exit' HUP TERM; echo set; sleep 600 & wait")
        async for _ in process.output():
            break
        await box.end()
        assert (box.root / "asked").read_text() == "asked\n"


@as_root
@both
async def test_a_confined_box_that_is_let_go_of_is_found_with_what_runs_in_it(box, data, confined):
    await box.start()
    async with RemoteWorkspace(box.url, box.token) as workspace:
        process = await workspace.start(["cat"])
    box.let_go()
    found = await BoxProcess.find(box.folder, data / "output" / box.folder.name, confined)
    async with found, RemoteWorkspace(found.url, found.token) as workspace:
        assert (found.pid, found.instance) == (box.pid, box.instance)
        assert [info.id for info in await workspace.processes()] == [process.id]
    assert gone(box.pid)
    assert not box.folder.exists()
    assert not (data / "output" / box.folder.name).exists()


@as_root
@both
async def test_a_box_that_is_confined_in_another_way_than_is_wanted_now_is_ended(box):
    await box.start()
    box.let_go()
    assert await BoxProcess.find(box.folder, confinement=NOT_CONFINED) is None
    assert gone(box.pid)
    assert not box.folder.exists()


@as_root
@both
async def test_a_confined_box_cannot_keep_a_folder_from_being_removed(workspace, box, confined):
    made = await workspace.execute(
        "mkdir closed && touch closed/file && chmod 0 closed && ln -s / link && "
        'python3 -c \'import os\nfor _ in range(3000): os.mkdir("deep"); os.chdir("deep")\nos.chmod(".", 0)\''
    )
    assert made.exit_code == 0
    confined.remove(box.root)
    assert not box.root.exists()


@as_root
@both
async def test_a_file_that_a_command_made_belongs_to_its_user(workspace, box):
    await workspace.execute("echo hello >file")
    found = (box.root / "file").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (BOX_USER, BOX_USER, 0o644)


@as_root
@in_namespaces
async def test_in_namespaces_there_is_no_network(workspace):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert "refused" in (await workspace.execute(["/usr/bin/python3", "-c", reach])).stderr
    assert (await workspace.execute("tail -n +3 /proc/net/dev | cut -d: -f1")).stdout.split() == ["lo"]


@as_root
@in_namespaces
async def test_in_namespaces_nobody_else_is_seen(workspace, box, neighbour):
    processes = (await workspace.execute("cat /proc/[0-9]*/comm")).stdout.split()
    assert {"bwrap", "ld.so"} <= set(processes) <= {"bwrap", "ld.so", "bash", "cat"}
    assert (await workspace.execute(["ls", str(neighbour.parent)])).stdout.split() == [box.root.name]
    assert (await workspace.execute(["cat", str(neighbour / "file")])).exit_code == 1


@as_root
@in_namespaces
async def test_in_namespaces_no_more_can_be_made(workspace):
    assert (await workspace.execute("unshare --user true")).exit_code != 0


@as_root
@in_namespaces
@pytest.mark.parametrize("place", ["/", "/usr", "/etc", "/opt/agent", "/bin"])
async def test_in_namespaces_the_system_is_read_only(workspace, place):
    said = (await workspace.execute(["touch", f"{place}/planted"])).stderr
    assert "Read-only file system" in said


async def refused(isolation: str, data: Path, *prefix: str, **environment: str) -> str:
    """The sentence with which another process, started like this, is refused."""
    program = (
        "import asyncio, sys; from pathlib import Path; from workspaces.box.confinement import confinement\n"
        "async def main():\n"
        "    found = await confinement(sys.argv[1], 10001, Path(sys.argv[2]))\n"
        "    await found.check(Path(sys.argv[2]))\n"
        "try: asyncio.run(main())\n"
        "except Exception as exc: print(type(exc).__name__, exc)\n"
    )
    command = [*prefix, sys.executable, "-c", program, isolation, str(data)]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )
    return done.stdout.strip()


WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
AS_SOMEBODY = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups")


@as_root
async def test_without_the_capabilities_there_is_no_other_user(data):
    said = await refused("user", data, *WITHOUT_CAPABILITIES)
    assert "IsolationUnavailable isolation=user is not available: this server lacks" in said
    assert "CHOWN, KILL, SETGID, SETUID, SETPCAP; start it as root" in said


@as_root
@both
async def test_a_program_that_is_missing_is_named_with_its_package(data, tmp_path, isolation):
    said = await refused(isolation, data, PATH=str(tmp_path))
    assert "there is no program setpriv; install util-linux" in said


@as_root
async def test_where_there_are_no_more_namespaces_bwrap_is_not_available(data):
    inside = ("unshare", "--user", "--map-root-user", "sh", "-c")
    no_capability = "setpriv --bounding-set=-all --inh-caps=-all"
    none_left = f'echo 0 >/proc/sys/user/max_user_namespaces; exec {no_capability} "$0" "$@"'
    said = await refused("bwrap", data, *inside, none_left)
    assert "IsolationUnavailable isolation=bwrap is not available: bwrap: " in said
    assert "allow user namespaces" in said


@as_root
async def test_a_data_folder_that_others_cannot_reach_is_named(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "data").mkdir(mode=0o711)
    (tmp_path / "data" / "workspaces").mkdir(mode=0o711)
    said = await refused("user", tmp_path / "data")
    assert f"user 10001 cannot reach the data folder {tmp_path / 'data'}; let others pass" in said


@pytest.mark.parametrize("user", [0, os.geteuid()])
@as_root
async def test_the_user_of_boxes_is_neither_root_nor_the_servers_own(data, user):
    with pytest.raises(IsolationUnavailable, match="choose another box_user"):
        await confinement("user", user, data)


@as_root
@in_namespaces
async def test_in_namespaces_the_user_has_a_name_and_the_host_an_address(workspace):
    said = await workspace.execute(
        'whoami; getent hosts "$(hostname)"; git init -q; git commit --allow-empty -qm x'
    )
    assert said.stdout.split() == ["agent", "127.0.0.1", "localhost", "sandbox"]
    assert said.exit_code == 0


@as_root
@in_namespaces
async def test_in_namespaces_nothing_takes_memory_without_limit(workspace):
    filled = await workspace.execute(
        "for place in /dev /dev/shm /tmp /run; do "
        "head -c 300m /dev/zero >$place/big && echo $place; rm -f $place/big; done"
    )
    assert filled.stdout == ""


@as_root
@in_namespaces
async def test_a_folder_that_leads_elsewhere_by_now_is_not_shown(data, confined, tmp_path):
    (tmp_path / "work").symlink_to(data)
    box = BoxProcess(tmp_path / "work", data / "boxes" / new_id(), confinement=confined)
    with pytest.raises(PathDenied, match="leads elsewhere"):
        await box.start()
    assert not box.folder.exists()


@as_root
def test_a_file_with_a_name_outside_of_the_workspace_is_not_given_to_boxes(tmp_path):
    secret, workspace = tmp_path / "api_key", tmp_path / "workspace"
    secret.write_text("secret")
    (workspace / "deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (workspace / name).write_text("")
    os.link(workspace / "one", workspace / "deep" / "one_again")
    (workspace / "link").symlink_to(secret)
    given = Confinement(isolation="user", user=BOX_USER)
    given.take_over(workspace)
    owners = {path.name: path.lstat().st_uid for path in (workspace, *workspace.rglob("*"))}
    assert owners.pop("link") == 0
    assert set(owners.values()) == {BOX_USER}
    os.link(secret, workspace / "deep" / "innocent")
    with pytest.raises(OSError, match="it has other names outside of the workspace") as refused:
        given.take_over(workspace)
    assert refused.value.filename == str(workspace / "deep" / "innocent")
    assert secret.stat().st_uid == 0
