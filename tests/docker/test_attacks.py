"""What a hostile program reaches from inside: nothing in a sandbox, nearly everything where nothing is in its way."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import images
from tests.docker.attacks.__main__ import ATTACKS
from workspaces import labels
from workspaces.engine import Engine

pytestmark = pytest.mark.docker

PROGRAM = Path(__file__).parent / "attacks"
LOADER = ("/opt/agent/lib/ld.so", "--inhibit-cache", "--library-path", "/opt/agent/lib")
PYTHON = (*LOADER, "/opt/agent/bin/python3")
"""That of the box runtime: images need not have one."""

SECRET = "a secret that only the environment of another process has"
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
    "Tmpfs": {folder: "rw,exec" for folder in ("/workspace", "/run", "/tmp")},
    "Init": True,
}
"""A container in whose way hardly anything is."""
UNGUARDED = """
write_core_pattern write_sysctl_of_memory write_passwd write_hosts read_kmsg read_shadow run_a_program_in_tmp
run_a_program_in_run make_a_folder_elsewhere read_a_file_of_the_host link_to_shadow call_bpf call_perf_event_open
call_ptrace_init call_ptrace_traceme call_process_vm_readv call_process_vm_writev call_kcmp call_unshare_user
call_unshare_mounts call_unshare_net call_unshare_pids call_clone3_user call_umount_root call_pivot_root call_chroot
call_fsopen call_fspick call_open_tree call_move_mount call_mount_setattr call_name_to_handle_at
call_open_by_handle_at call_reboot call_swapon call_swapoff call_settimeofday call_clock_settime call_syslog
call_personality call_fanotify_init call_setuid_0 call_setgid_0 call_setgroups enter_uts enter_net enter_mnt
enter_pid clone_user steal_a_descriptor_of_init set_hostname raise_file_size be_nice_to_nobody use_disks_first
mount_tmpfs mount_proc mount_bind mount_root_again make_device_disk make_device_memory make_device_null
socket_packet socket_icmp socket_netlink_generic socket_netlink_uevent reach_a_service_of_the_host have_a_route
have_an_interface greet_neighbours hold_a_capability be_root gain_privileges run_without_filter
give_a_file_to_root give_a_file_capabilities set_a_trusted_attribute see_strangers read_environment_of_strangers
open_memory_of_strangers walk_into_strangers list_descriptors_of_strangers signal_strangers find_the_secret
"""
"""Attacks that have to succeed there, or they would prove nothing elsewhere. The others need what not every kernel
has: a driver, a family of sockets, a file."""


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
    given = {"canary": SECRET[::-1], "host_file": "/file", "host_port": port}
    body = {
        "Image": images.FULL,
        "Env": ["PYTHONDONTWRITEBYTECODE=1"],
        "WorkingDir": "/workspace",
        "Entrypoint": ["bash", "-c"],
        "Cmd": [
            'SECRET="$0" setpriv --reuid 5 sleep 600 & PYTHONPATH=/ exec python3 -m attacks "$1"',
            SECRET,
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
