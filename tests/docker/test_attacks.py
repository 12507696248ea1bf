"""What a hostile program reaches from inside: nothing in a sandbox, nearly everything where nothing is in its way."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    InvalidParams,
    OutsideWorkspace,
    PathNotFound,
    PolicyDenied,
)
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.contract import Workspace
from tests.docker import images
from tests.docker.attacks.__main__ import ATTACKS
from tests.docker.floods import flooded
from tests.docker.fresh import fresh
from tests.docker.sandboxes import container, sandbox
from tests.docker.servers import SERVER, state
from workspaces import DockerWorkspace
from workspaces.backend import labels
from workspaces.backend.docker.backend import DockerBackend
from workspaces.backend.docker.engine import Engine
from workspaces.backend.records import this_process
from workspaces.backend.sweep import Sweep
from workspaces.started import _remove_leftovers

pytestmark = pytest.mark.docker

PROGRAM = Path(__file__).parent / "attacks"
LOADER = ("/opt/agent/lib/ld.so", "--inhibit-cache", "--library-path", "/opt/agent/lib")
PYTHON = (*LOADER, "/opt/agent/bin/python3")
"""That of the box runtime: images need not have one."""

SECRET = "a secret that only the environment of another process has"
A_BOX = "import time; file = open('/dev/null'); time.sleep(600)"
"""What looks like one to attacks on them."""
CAPABILITIES = [
    "DAC_READ_SEARCH",
    "NET_ADMIN",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_PTRACE",
    "SYS_TIME",
    "SYSLOG",
]
LOOSE = {
    "CapAdd": CAPABILITIES,
    "SecurityOpt": ["seccomp=unconfined", "apparmor=unconfined"],
    "MaskedPaths": [],
    "ReadonlyPaths": [],
    "Tmpfs": {folder: "rw,exec" for folder in ("/workspace", "/run", "/tmp", "/run/agent", "/opt/agent")},
    "Init": True,
}
"""A container in whose way hardly anything is."""
UNGUARDED = """
write_core_pattern write_sysctl_of_memory write_passwd write_hosts read_kmsg read_shadow
run_a_program_in_run make_a_folder_elsewhere read_a_file_of_the_host link_to_shadow call_bpf call_perf_event_open
call_ptrace_init call_ptrace_traceme call_process_vm_readv call_process_vm_writev call_kcmp call_unshare_user
call_unshare_mounts call_unshare_net call_unshare_pids call_clone3_user call_umount_root call_pivot_root call_chroot
call_fsopen call_fspick call_open_tree call_move_mount call_mount_setattr call_name_to_handle_at
call_open_by_handle_at call_reboot call_swapon call_swapoff call_settimeofday call_clock_settime call_syslog
call_personality call_fanotify_init call_setuid_0 call_setgid_0 call_setgroups enter_uts enter_net enter_mnt
enter_pid clone_user steal_a_descriptor_of_init set_hostname raise_file_size be_nice_to_nobody use_disks_first
mount_tmpfs mount_proc mount_bind mount_root_again mount_over_the_box mount_over_the_runtime
make_device_disk make_device_memory make_device_null
socket_packet socket_icmp socket_netlink_generic socket_netlink_uevent reach_a_service_of_the_host have_a_route
have_an_interface greet_neighbours hold_a_capability be_root gain_privileges run_without_filter
give_a_file_to_root give_a_file_capabilities set_a_trusted_attribute see_strangers read_environment_of_strangers
open_memory_of_strangers walk_into_strangers list_descriptors_of_strangers signal_strangers find_the_secret
open_memory_of_the_box read_environment_of_the_box list_descriptors_of_the_box take_a_descriptor_of_the_box
trace_the_box read_memory_of_the_box take_the_place_of_the_box link_what_is_anothers
"""
"""Attacks that have to succeed there, or they would prove nothing elsewhere. The others need what not every kernel
has: a driver, a family of sockets, a file."""


A_SERVERS_CONTAINER = """
make_a_folder_elsewhere raise_core raise_file_size see_strangers have_a_route have_an_interface
ask_for_a_name greet_neighbours reach_metadata reach_the_internet reach_a_service_of_the_host
"""
"""What commands beside a server may: they have a network, a root of their own, and see that there is a server."""


@pytest.fixture
def port() -> Iterator[int]:
    """Where somebody listens at all addresses of this machine."""
    with socket.create_server(("0.0.0.0", 0)) as listening:
        yield listening.getsockname()[1]


def got_through(output: str) -> dict[str, str]:
    """Which attacks came how far; all of them were tried, and all of them work."""
    found = dict(line.split(": ", 1) for line in output.splitlines())
    assert found.keys() == ATTACKS.keys()
    assert {name: how for name, how in found.items() if how.startswith("BROKEN")} == {}
    return {name: how for name, how in found.items() if not how.startswith("refused: ")}


async def test_the_attacks_get_through_where_nothing_is_in_their_way(
    engine: Engine, instance, port, tmp_path
):
    (tmp_path / "file").write_text("of the host")
    (tmp_path / "file").chmod(0o644)
    given = {"canary": SECRET[::-1], "host_file": "/file", "host_port": port, "others": ["/workspace/others"]}
    body = {
        "Image": images.FULL,
        "Env": ["PYTHONDONTWRITEBYTECODE=1"],
        "WorkingDir": "/workspace",
        "Entrypoint": ["bash", "-c"],
        "Cmd": [
            'SECRET="$0" setpriv --reuid 5 sleep 600 & python3 -c "$1" agent_sdk"".box & '
            ": >/workspace/others; : >/run/agent/box.sock; "
            'PYTHONPATH=/ exec python3 -m attacks "$2"',
            SECRET,
            A_BOX,
            json.dumps(given),
        ],
        "Labels": {labels.INSTANCE: instance},
        "HostConfig": {**LOOSE, "Binds": [f"{PROGRAM}:/attacks:ro", f"{tmp_path}:/host:ro"]},
    }
    id = await engine.create(f"agent-test-{instance}", body)
    try:
        watch = engine.watch(id)
        await engine.start(id)
        assert (await watch.died).exit_code == 0
        missing = set(UNGUARDED.split()) - got_through(await engine.logs(id, 1000)).keys()
        assert missing == set()
    finally:
        await engine.remove(id)


async def attacked(workspace: Workspace, python: Sequence[str], **given: object) -> dict[str, str]:
    """Let every attack be tried by a command; which came how far."""
    folder = (await workspace.describe()).working_dir
    for file in PROGRAM.glob("*.py"):
        await workspace.upload(file, f"{folder}/attacks/{file.name}")
    result = await workspace.execute([*python, "-m", "attacks", json.dumps(given)])
    assert (result.stderr, result.exit_code) == ("", 0)
    return got_through(result.stdout)


@pytest.mark.parametrize("image", [images.FULL, images.BUSYBOX])
async def test_no_attack_gets_out_of_a_sandbox(running_server, port, tmp_path, image):
    (tmp_path / "file").write_text("of the host")
    place = RemoteWorkspace(running_server.url, running_server.api_key, sandbox=Sandbox(image=image))
    async with fresh(place) as workspace:
        secret, file = running_server.api_key[::-1], str(tmp_path / "file")
        assert await attacked(workspace, PYTHON, canary=secret, host_file=file, host_port=port) == {}


async def test_no_flood_of_secrets_from_a_sandbox_gets_past_the_server_or_holds_it_up(running_server):
    def place() -> RemoteWorkspace:
        sandbox = Sandbox(image=images.BUSYBOX)
        return RemoteWorkspace(running_server.url, running_server.api_key, sandbox=sandbox)

    assert await flooded(place, running_server.data) == {}


PREPARED = {
    "swap_what_is_mounted": ("{shared}/a:/data", "mv /data/a /data/away && ln -s /etc /data/a"),
    "mount_over_the_runtime": ("{shared}:/opt/agent", "mkdir /data/bin && touch /data/bin/python3"),
    "mount_over_the_init": ("{shared}:/usr/sbin", "touch /data/docker-init"),
}
"""What one sandbox mounts, and what the command of another one has done to that before it starts."""


@pytest.mark.parametrize("attack", PREPARED)
async def test_no_sandbox_prepares_a_way_out_for_another_one(started, engine, tmp_path, attack):
    shared = tmp_path / "shared"
    (shared / "a").mkdir(parents=True)
    shared.chmod(0o777)
    mount, prepare = PREPARED[attack]
    async with started(sandbox_mounts=(str(shared),)) as server:
        with pytest.raises((PolicyDenied, InvalidParams)):
            async with sandbox(server, mounts=(mount.format(shared=shared),)) as workspace:
                async with sandbox(server, mounts=(f"{shared}:/data",)) as other:
                    assert (await other.execute(prepare)).exit_code == 0
                await workspace.execute("cat /data/passwd")


OTHER = new_id()
"""Another owner on the same engine, of whom no record says anything."""
IMITATED = {
    "be_anothers": dict.fromkeys((labels.INSTANCE, labels.CONVERSATION, labels.CREATE, labels.NAME), OTHER),
    "be_over": {labels.INSTANCE: OTHER, labels.EXPIRES: "1"},
    "be_left_by_a_dead_client": {labels.ROLE: labels.SERVER, labels.OWNER: this_process() + "0"},
}
"""Labels that an image has so that somebody else takes its containers for theirs, or for left over."""


@asynccontextmanager
async def labelled(image: str, marks: dict[str, str]) -> AsyncIterator[str]:
    """Another image, which has these labels."""

    async def docker(*command: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run, ["docker", *command], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    name, bare = f"agent-test/labelled:{new_id()}", await docker("create", image)
    try:
        changes = [f"--change=LABEL {mark}={value}" for mark, value in marks.items()]
        await docker("commit", *changes, bare, name)
        yield name
    finally:
        await docker("rm", bare)
        await docker("rmi", name)


async def let_others_sweep(engine: Engine) -> None:
    """Let all remove what they take for theirs or for left over: another server, and a client that starts."""
    problems: list[Exception] = []
    backend, others = DockerBackend(engine), {labels.INSTANCE: OTHER}
    await Sweep(backend, others, tuple, on_removed=lambda _: None, on_problem=problems.append).once()
    await _remove_leftovers(backend)
    assert problems == []


@pytest.mark.parametrize("attack", IMITATED)
async def test_no_label_of_an_image_has_a_sandbox_taken_for_anothers(server, engine, attack):
    async with (
        labelled(images.BUSYBOX, IMITATED[attack]) as image,
        fresh(RemoteWorkspace(server.url, server.key, sandbox=Sandbox(image=image))) as workspace,
    ):
        await workspace.execute("echo kept >/tmp/file")
        made = await container(engine, workspace)
        await let_others_sweep(engine)
        assert (await container(engine, workspace))["Id"] == made["Id"]
        assert (await workspace.execute("cat /tmp/file")).stdout == "kept\n"


@pytest.mark.parametrize("attack", IMITATED)
async def test_no_label_of_an_image_has_a_kept_server_taken_for_anothers(engine, free_name, attack):
    async with labelled(SERVER, IMITATED[attack]) as image:
        async with DockerWorkspace(image, name=free_name, keep=True):
            pass
        await engine.stop(free_name)  # as when the machine is switched off
        await let_others_sweep(engine)
        assert await state(engine, free_name) == "exited"
        async with DockerWorkspace(image, name=free_name):
            pass


async def test_no_attack_reaches_the_server_beside_or_the_host_below(port, tmp_path):
    (tmp_path / "file").write_text("of the host")
    async with DockerWorkspace(SERVER) as workspace:
        python = ["/opt/agent-server/bin/python"]
        secret, file = workspace.target.api_key[::-1], str(tmp_path / "file")
        through = await attacked(workspace, python, canary=secret, host_file=file, host_port=port)
        assert through.keys() - set(A_SERVERS_CONTAINER.split()) == set()


async def test_no_symlink_of_a_sandbox_leads_to_the_host(running_server, tmp_path):
    file, source = tmp_path / "file", tmp_path / "source"
    file.write_text("of the host")
    source.write_text("of a sandbox")
    place = RemoteWorkspace(running_server.url, running_server.api_key, sandbox=Sandbox(image=images.FULL))
    async with fresh(place) as workspace:
        await workspace.execute(f"ln -s {file} link; ln -s {tmp_path} folder; ln -s / root; ln -s .. up")
        paths = ("link", "folder/file", f"root{file}", f"up/..{file}")
        for path in paths:
            with pytest.raises((PathNotFound, OutsideWorkspace)):
                await workspace.download(path, tmp_path / "copy")
        for path in paths:
            with suppress(OutsideWorkspace):
                await workspace.upload(source, path)  # to a folder of that name in the sandbox
        await workspace.files.remove("folder/file")
    assert file.read_text() == "of the host"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "source"}
