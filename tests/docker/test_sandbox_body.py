"""What the engine is asked for, and what it makes of it: frozen, whatever clients write and images say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_sdk.protocol.errors import ImageUnavailable
from agent_sdk.protocol.results import Mount, Profile
from agent_sdk.protocol.specs import Sandbox
from workspaces.backend.contract import Image
from workspaces.backend.docker.profiles import box_body, differences
from workspaces.box.machine import Accounts, Places, box_differences, box_machine, temporary

GOLDEN = Path(__file__).parent / "golden" / "sandbox_body.json"
"""Changed by hand only: it is what the isolation of sandboxes consists of."""

IMAGE = Image(name="x", id="sha256:0000", env=("PATH=/x", "LD_PRELOAD=/x.so", "PYTHONPATH"))
COMMAND = ("/opt/agent/lib/ld.so", "python3")
PLACES = Places(
    workspace=Path("/data/workspaces/c"),
    output=Path("/data/output/c"),
    temporary=(Path("/data/temporary/c/0"),),
    folder=Path("/data/boxes/c/run"),
    etc=Path("/data/boxes/c/etc"),
    runtime=Path("/data/runtime/0"),
)
PROFILE = Profile(
    uid=10001,
    gid=10001,
    capabilities="0000000000000000",
    capabilities_bound="0000000000000000",
    no_new_privileges=True,
    seccomp=2,
    seccomp_filters=2,
    read_only_root=True,
    pids_max=256,
    memory_max=512 << 20,
    interfaces=("lo",),
    mounts=(
        Mount(target="/", kind="overlay", options=("ro",)),
        Mount(target="/proc", kind="proc"),
        Mount(target="/proc/sys", kind="proc", options=("ro",)),
        Mount(target="/dev/shm", kind="tmpfs"),
        Mount(target="/tmp", kind="ext4"),
        Mount(target="/run", kind="tmpfs"),
        Mount(target="/workspace", kind="ext4"),
        Mount(target="/run/agent", kind="ext4"),
        Mount(target="/run/agent-output", kind="ext4"),
        Mount(target="/opt/agent", kind="ext4", options=("ro", "relatime")),
        Mount(target="/etc/passwd", kind="ext4", options=("ro",)),
        Mount(target="/etc/group", kind="ext4", options=("ro",)),
        Mount(target="/etc/hosts", kind="ext4", options=("ro",)),
    ),
)


def machine(runtime="runc", **wanted):
    return box_machine(
        Sandbox(image="x", **wanted),
        IMAGE,
        Accounts(files=(("/etc/passwd", b""), ("/etc/group", b""))),
        PLACES,
        ["/tmp"],
        name="agent-box-c",
        labels={"io.agentserver.instance": "i"},
        command=COMMAND,
        linger=60.0,
        runtime=runtime,
    )


def body(**wanted):
    given = replace(machine(**wanted), command=COMMAND)  # without the options of a box
    return box_body(given, lambda mount: (mount.source, "rprivate"))


def test_the_request_is_the_frozen_one():
    assert body() == json.loads(GOLDEN.read_text())


def test_a_user_changes_what_is_theirs_and_nothing_else():
    asked = body(cpus=2.5, memory="1g", pids=100, network="bridge", gpus="0,1")
    expected = json.loads(GOLDEN.read_text())
    host = expected["HostConfig"]
    host["ExtraHosts"] = []  # with a network the engine gives the host its name itself
    host |= {"NanoCpus": 2_500_000_000, "Memory": 1 << 30, "MemorySwap": 1 << 30, "PidsLimit": 100}
    host |= {"NetworkMode": "bridge"}
    host["DeviceRequests"] = [{"Driver": "", "Capabilities": [["gpu"]], "DeviceIDs": ["0", "1"]}]
    assert asked == expected


def test_variables_for_commands_are_not_in_the_configuration_of_the_container():
    assert "hidden" not in json.dumps(body(env={"TOKEN": "hidden"}))


def test_what_is_writable_and_does_not_last_is_temporary_folders_what_was_asked_for_and_volumes_of_the_image():
    asked = Sandbox(image="x", writable=("/home/me", "/data"))
    assert temporary(asked, replace(IMAGE, volumes=("/data", "/db", "/workspace", "/tmp"))) == [
        "/tmp",
        "/home/me",
        "/data",
        "/db",
    ]


@pytest.mark.parametrize(
    "volume", ["/", "/proc", "/proc/sys", "/dev/x", "/opt", "/opt/agent/..", "data", "/a/../b"]
)
def test_an_image_with_a_volume_where_none_can_be_is_refused(volume):
    with pytest.raises(ImageUnavailable, match="volume"):
        temporary(Sandbox(image="x"), replace(IMAGE, volumes=(volume,)))


def test_what_an_engine_leaves_out_or_writes_as_nothing_is_no_difference():
    asked = body()
    inspected = {
        "Config": dict(asked),
        "HostConfig": {**asked["HostConfig"], "Devices": None, "MemorySwap": -1},
    }
    del inspected["HostConfig"]["CapAdd"]
    assert differences(asked, inspected) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("Privileged", True),
        ("CapDrop", []),
        ("CapAdd", ["SYS_ADMIN"]),
        ("SecurityOpt", None),
        ("ReadonlyRootfs", False),
        ("NetworkMode", "default"),
        ("PidMode", "host"),
        ("Memory", 0),
        ("MemorySwap", 1 << 40),
        ("PidsLimit", None),
        ("Binds", ["/:/host"]),
        ("Sysctls", {"kernel.shmmax": "1"}),
        ("Tmpfs", {"/tmp": "rw,exec"}),
        ("PortBindings", {"22/tcp": [{"HostPort": "22"}]}),
        ("Devices", [{"PathOnHost": "/dev/sda"}]),
        ("Ulimits", []),
        ("Init", True),
        ("Runtime", "other"),
        ("LogConfig", {"Type": "journald", "Config": {}}),
    ],
)
def test_what_an_engine_makes_otherwise_is_a_difference(field, value):
    asked = body()
    (difference,) = differences(asked, {"Config": asked, "HostConfig": {**asked["HostConfig"], field: value}})
    assert difference.startswith(f"HostConfig.{field}: ")


def test_what_an_engine_makes_of_the_configuration_counts_as_well():
    asked = body()
    for field, value in (("User", "root"), ("Entrypoint", ["/bin/sh"]), ("Env", ["LD_PRELOAD=/x.so"])):
        inspected = {"Config": {**asked, field: value}, "HostConfig": asked["HostConfig"]}
        assert len(differences(asked, inspected)) == 1


def test_a_box_that_finds_what_was_asked_for_has_no_differences():
    assert box_differences(machine(), PROFILE) == []


@pytest.mark.parametrize(
    "found",
    [
        {"uid": 0},
        {"gid": 0},
        {"groups": (10001, 999)},
        {"capabilities": "00000000a80425fb"},
        {"capabilities_bound": "1"},
        {"no_new_privileges": False},
        {"seccomp": 0},
        {"seccomp_filters": 1},
        {"read_only_root": False},
        {"pids_max": None},
        {"pids_max": 257},
        {"memory_max": None},
        {"memory_max": 1 << 40},
        {"interfaces": ("lo", "eth0")},
        {"mounts": (*PROFILE.mounts[:-4], *PROFILE.mounts[-3:])},
        {"mounts": (*PROFILE.mounts, Mount(target="/host", kind="ext4"))},
        {"mounts": (*PROFILE.mounts, Mount(target="/opt/agent", kind="ext4", options=("rw",)))},
    ],
)
def test_what_a_box_finds_otherwise_is_a_difference(found):
    assert len(box_differences(machine(), replace(PROFILE, **found))) == 1


def test_a_box_that_does_not_say_what_it_finds_is_not_believed():
    assert box_differences(machine(), None) != []


def test_a_runtime_with_a_kernel_of_its_own_is_asked_for_less():
    asked = machine("runsc")
    seen = replace(
        PROFILE, seccomp=0, seccomp_filters=0, no_new_privileges=False, pids_max=None, memory_max=None
    )
    assert box_differences(asked, seen, own_kernel=True) == []
    assert box_differences(asked, replace(seen, uid=0), own_kernel=True) != []
