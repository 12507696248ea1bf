"""What clients may not ask of a sandbox: no field of the engine's, and no value that this server does not allow."""

from __future__ import annotations

import pytest

from agent_sdk.protocol.errors import (
    AgentServerError,
    ImageUnavailable,
    InvalidParams,
    IsolationUnavailable,
    PolicyDenied,
)
from agent_sdk.protocol.specs import Sandbox
from agent_server.config.options import ServerConfig
from agent_server.conversations.workspace import check_most, checked

# fmt: off
FIELDS_OF_THE_ENGINE = [
    "Binds", "Mounts", "Volumes", "VolumesFrom", "VolumeDriver", "Devices",
    "DeviceRequests", "DeviceCgroupRules", "Privileged", "CapAdd", "CapDrop", "SecurityOpt",
    "ReadonlyRootfs", "Tmpfs", "NetworkMode", "NetworkingConfig", "PortBindings", "PublishAllPorts",
    "ExposedPorts", "Links", "ExtraHosts", "Dns", "DnsOptions", "IpcMode",
    "PidMode", "UTSMode", "UsernsMode", "CgroupnsMode", "Cgroup", "CgroupParent",
    "Sysctls", "Ulimits", "Runtime", "GroupAdd", "MaskedPaths", "ReadonlyPaths",
    "OomScoreAdj", "OomKillDisable", "StorageOpt", "LogConfig", "RestartPolicy", "AutoRemove",
    "Init", "HostConfig", "User", "Entrypoint", "Cmd", "Env",
    "Labels", "Healthcheck", "Hostname", "WorkingDir", "ShmSize", "privileged",
    "user", "entrypoint", "command", "labels", "devices", "cap_add",
    "security_opt", "volumes", "network_mode", "pid_mode",
]
# fmt: on


async def test_there_is_no_way_to_name_a_field_of_the_engine(server):
    for field in FIELDS_OF_THE_ENGINE:
        async with await server.wire() as wire:
            await wire.upgrade(server.key)
            refused = await wire.initialize(workspace={"sandbox": {"image": "x", field: ["host"]}})
            assert refused.get("error", {}).get("code") == -32602, field
            assert field in refused["error"]["message"]


def config(**options):
    return ServerConfig(**options)


@pytest.mark.parametrize(
    ("given", "kind", "names"),
    [
        ({"memory": "lots"}, InvalidParams, "memory"),
        ({"memory": "31m"}, InvalidParams, "memory"),
        ({"memory": "-1g"}, InvalidParams, "memory"),
        ({"disk": "big"}, InvalidParams, "disk"),
        ({"network": "egress"}, IsolationUnavailable, "sandbox.network"),
        ({"network": "bridge"}, PolicyDenied, "sandbox.network"),
        ({"env": {"A=B": "x"}}, InvalidParams, "env"),
        ({"env": {"": "x"}}, InvalidParams, "env"),
        ({"env": {"A": "x\0y"}}, InvalidParams, "env"),
        ({"gpus": "all,--privileged"}, InvalidParams, "gpus"),
        ({"platform": "../x"}, InvalidParams, "platform"),
        ({"mounts": ("/etc",)}, InvalidParams, "mounts"),
        ({"mounts": ("relative:/x",)}, InvalidParams, "mounts"),
        ({"mounts": ("/etc:/x:rw,rshared",)}, InvalidParams, "mounts"),
        ({"mounts": ("/etc:/x:ro:more",)}, InvalidParams, "mounts"),
        ({"mounts": ("/etc:/x",)}, PolicyDenied, "mounts"),
        ({"tmp": "much"}, InvalidParams, "tmp"),
        ({"writable": ("data",)}, InvalidParams, "writable"),
        ({"writable": ("/data/",)}, InvalidParams, "writable"),
        (
            {"writable": ("/usr/sbin",)},
            InvalidParams,
            "writable: nothing can be mounted at /usr/sbin",
        ),
        ({"writable": ("/opt/agent",)}, InvalidParams, "writable"),
        ({"writable": ("/data/a", "/data")}, InvalidParams, "one below the other"),
        ({"writable": ("/data",) * 33}, InvalidParams, "writable: limit 32, got 33"),
        ({"mounts": ("/etc:/x",) * 33}, InvalidParams, "mounts"),
    ],
)
def test_what_makes_no_sense_or_is_not_allowed_is_refused_by_its_name(given, kind, names):
    with pytest.raises(AgentServerError, match=names) as refused:
        checked(Sandbox(image="x", **given), config())
    assert type(refused.value) is kind


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/proc/sys",
        "/opt",
        "/opt/agent/lib",
        "/run/agent",
        "/run",
        "/workspace",
        "/workspace/in",
        "/x/../proc",
    ]
    + [
        "/usr",
        "/usr/sbin",
        "/sbin",
        "/lib64",
        "/etc/passwd",
        "/bin",
        "/tmp",
        "/dev/shm",
        "/x/",
        "relative",
        "",
    ],
)
def test_nothing_is_mounted_over_the_system_or_over_what_is_ours(tmp_path, target):
    with pytest.raises(InvalidParams, match="mounts"):
        checked(Sandbox(image="x", mounts=(f"{tmp_path}:{target}",)), config(sandbox_mounts=(str(tmp_path),)))


@pytest.mark.parametrize("target", ["/data", "/mnt/a", "/home/me", "/opt/tool", "/var/lib/db", "/testbed"])
def test_folders_that_are_nobodys_may_be_mounted(tmp_path, target):
    mount = f"{tmp_path}:{target}:ro"
    allowed = config(sandbox_mounts=(str(tmp_path),))
    assert checked(Sandbox(image="x", mounts=(mount,)), allowed).mounts == (mount,)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"memory": "5g"}, "sandbox.memory: this server allows at most 4096m, not 5g; .*sandbox_max_memory"),
        ({"cpus": 2.5}, "sandbox.cpus: this server allows at most 2, not 2.5; .*sandbox_max_cpus"),
        ({"pids": 65536}, "sandbox.pids: this server allows at most .*, not 65536; .*sandbox_max_pids"),
    ],
)
def test_nobody_gets_more_than_the_engines_machine_has(given, says):
    with pytest.raises(PolicyDenied, match=says):
        check_most(Sandbox(image="x", **given), config(), cpus=2, memory=4 << 30)


def test_the_machine_that_counts_is_that_of_the_engine():
    check_most(Sandbox(image="x", memory="2t", cpus=500), config(), cpus=512, memory=4 << 40)
    check_most(Sandbox(image="x", memory="2t", cpus=500), config(), cpus=0, memory=0)  # it does not say


def test_no_profile_is_given_that_the_server_does_not_allow():
    with pytest.raises(PolicyDenied, match="sandbox.profile: this server allows locked, not task"):
        checked(Sandbox(image="x", profile="task"), config())


def test_what_clients_may_ask_for_at_most_is_for_the_server_to_say():
    allowed = config(sandbox_max_memory="2t", sandbox_max_cpus=0.5, sandbox_max_pids=65536)
    check_most(Sandbox(image="x", memory="1t", cpus=0.5, pids=65536), allowed, cpus=1, memory=1)
    with pytest.raises(PolicyDenied, match="sandbox.cpus: this server allows at most 0.5, not 1;"):
        check_most(Sandbox(image="x"), allowed, cpus=8, memory=1)


def test_a_runtime_that_the_server_wants_is_not_changed_for_a_weaker_one():
    strict = config(sandbox_runtime="runsc")
    assert checked(Sandbox(image="x", runtime="runsc"), strict).runtime == "runsc"
    with pytest.raises(PolicyDenied, match="sandbox.runtime: this server allows runsc, not runc"):
        checked(Sandbox(image="x", runtime="runc"), strict)
    assert (
        checked(Sandbox(image="x", runtime="runsc"), config()).runtime == "runsc"
    )  # stronger than the usual
    both = config(sandbox_runtime="runsc", sandbox_runtimes=("runsc", "runc"))
    assert checked(Sandbox(image="x", runtime="runc"), both).runtime == "runc"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"user": "root"}, 'sandbox.user: .* takes profile="task"'),
        ({"profile": "task", "user": "a b"}, "user: expected a name or a number"),
        ({"profile": "task", "writable": ("/data",)}, "writable: with profile task all"),
        ({"profile": "task", "mounts": ("/etc:/data",)}, "mounts: .* end in :ro"),
    ],
)
def test_what_a_profile_has_not_is_refused_with_what_it_has(given, says):
    with pytest.raises(InvalidParams, match=says):
        checked(Sandbox(image="x", **given), config(sandbox_profiles=("locked", "task")))


def test_images_are_those_that_the_server_allows():
    allowed = config(sandbox_images=("team/*", "debian:12"))
    for image in ("team/a:1", "debian:12"):
        assert checked(Sandbox(image=image), allowed).image == image
    for image in ("debian:13", "other/team/a", "xteam/a"):
        with pytest.raises(ImageUnavailable, match="debian:12"):
            checked(Sandbox(image=image), allowed)


def test_a_mount_is_allowed_by_where_it_really_leads(tmp_path):
    shared, outside = tmp_path / "shared", tmp_path / "shared-not"
    for folder in (shared, outside, shared / "a"):
        folder.mkdir()
    (shared / "link").symlink_to(outside)
    (tmp_path / "in").symlink_to(shared / "a")
    allowed = config(sandbox_mounts=(str(shared),))

    def mounts(source, *options):
        return checked(Sandbox(image="x", mounts=(":".join([str(source), "/x", *options]),)), allowed).mounts

    assert mounts(shared / "a", "ro") == (f"{shared}/a:/x:ro",)
    assert mounts(tmp_path / "in") == (f"{shared}/a:/x",)
    for source in (shared / "link", outside, tmp_path, shared / "a" / ".." / ".."):
        with pytest.raises(PolicyDenied):
            mounts(source)
    with pytest.raises(InvalidParams, match="there is no"):
        mounts(shared / "missing")


async def test_a_server_without_an_engine_refuses_sandboxes_and_serves_the_rest(start, tmp_path):
    async with start(engine=f"unix://{tmp_path}/no.sock") as server:
        async with await server.wire() as wire:
            await wire.upgrade(server.key)
            refused = (await wire.initialize(workspace={"sandbox": {"image": "x"}}))["error"]
            assert (refused["code"], refused["data"]["kind"]) == (-32008, "engine_unavailable")
            assert "start Docker" in refused["message"]
        async with server.session() as wire:
            assert wire.answered["conversation"]


async def test_a_workspace_is_one_thing_only(server, tmp_path):
    async with await server.wire() as wire:
        await wire.upgrade(server.key)
        both = {"sandbox": {"image": "x"}, "working_dir": str(tmp_path)}
        assert "exclude each other" in (await wire.initialize(workspace=both))["error"]["message"]


async def test_a_plain_process_can_be_neither_paused_nor_copied(server):
    async with server.session() as wire:
        op_id = "00000000-0000-4000-8000-{:012}".format
        await wire.call("execute", argv=["true"], op_id=op_id(1))
        for number, method in enumerate(("workspace.pause", "workspace.snapshot"), 2):
            refused = (await wire.call(method, op_id=op_id(number)))["error"]
            assert refused["data"]["kind"] == "isolation_unavailable"
        assert "result" in await wire.call("workspace.resume", op_id=op_id(9))
