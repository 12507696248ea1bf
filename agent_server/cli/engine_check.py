"""What doctor says of the container engine. Only containers need one: so nothing here is a problem, but a wrong
option."""

from __future__ import annotations

import platform
import re
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from agent_sdk.protocol.errors import EngineUnavailable
from agent_server.config.options import ServerConfig
from workspaces.backend.docker.engine import Engine, EngineInfo
from workspaces.backend.docker.engine_info import GVISOR, reaches_sandboxes
from workspaces.box.disks import Disks

SAFE_RUNC = {(1, 2): 8, (1, 3): 3}
"""The first patch releases with the fixes of CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881; later lines have
them, earlier ones do not."""
DAEMON = "in /etc/docker/daemon.json"

State = Literal["ok", "warning", "problem"]


class Check(Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    state: State
    """`warning`: something is missing that not everybody needs; `problem`: a server would not work."""
    found: str
    mend: str = ""
    """What to do; empty when all is well."""


async def examine_engine(config: ServerConfig) -> AsyncIterator[Check]:
    """Yield the checks; one alone when there is no engine."""
    try:
        async with Engine(config.engine or None) as engine:
            info, where = engine.info, engine.where
    except EngineUnavailable as exc:
        sentence, _, mend = str(exc).rpartition(": ")
        if config.runtime_api == "docker":
            sentence = f"runtime_api is docker: {sentence}"
            yield Check(name="docker", state="problem", found=sentence, mend=mend)
        else:
            yield Check(
                name="docker", state="warning", found=sentence, mend=f"{mend}; only containers need it"
            )
        return
    yield Check(
        name="docker", state="ok", found=f"engine {info.version}, API {info.api}, {info.os}/{info.arch}"
    )
    yield address(where)
    for look in (live_restore, logs, runc, seccomp, users, cgroups):
        yield look(info)
    yield runtimes(info, config)
    yield roots(info, config)
    yield box_runtime(config)
    yield await disk_limits()


def address(where: str) -> Check:
    """Who may use the engine, and so is root on its machine."""
    name = "engine socket"
    if not where.startswith("unix://"):
        if where.startswith("https://"):
            return Check(name=name, state="ok", found=f"{where}, over TLS")
        mend = "use its Unix socket, or TLS: whoever reaches the port is root on its machine"
        return Check(name=name, state="warning", found=f"{where} asks for no certificate", mend=mend)
    path = Path(where.removeprefix("unix://"))
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return Check(name=name, state="warning", found=f"{path}: {exc.strerror}", mend="look at DOCKER_HOST")
    if mode & stat.S_IWOTH:
        mend = f"chmod 660 {path}: whoever may write to it is root on this machine"
        return Check(name=name, state="warning", found=f"all users may use {path}", mend=mend)
    return Check(name=name, state="ok", found=f"{path}, mode {stat.S_IMODE(mode):o}")


def live_restore(info: EngineInfo) -> Check:
    """Whether containers survive an update of the engine."""
    if info.live_restore:
        return Check(name="live restore", state="ok", found="containers go on while the engine restarts")
    mend = f'set "live-restore": true {DAEMON}'
    found = "containers end with the engine, e.g. at its update"
    return Check(name="live restore", state="warning", found=found, mend=mend)


def logs(info: EngineInfo) -> Check:
    """Whether the output of containers that are not ours can fill the disk; ours have limits of their own."""
    if info.logging_driver == "json-file":
        mend = (
            f'set "log-driver": "local" {DAEMON}, or log-opts with max-size; containers of ours have limits'
        )
        found = "the engine's default, json-file, has no limit unless one was set"
        return Check(name="engine logs", state="warning", found=found, mend=mend)
    return Check(name="engine logs", state="ok", found=info.logging_driver or "not known")


def runc(info: EngineInfo) -> Check:
    """Whether known ways out of a container are closed."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", info.runc)
    if numbers is None:
        return Check(name="runc", state="ok", found=f"version {info.runc or 'not known'}: not compared")
    major, minor, patch = map(int, numbers.groups())
    least = SAFE_RUNC.get((major, minor))
    if (major, minor) < min(SAFE_RUNC) or (least is not None and patch < least):
        found = f"{info.runc} may lack the fixes of CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881"
        mend = "update it to 1.2.8, 1.3.3 or newer, unless your distribution has fixed it; or use runsc"
        return Check(name="runc", state="warning", found=found, mend=mend)
    return Check(name="runc", state="ok", found=info.runc)


def seccomp(info: EngineInfo) -> Check:
    """Whether the engine filters system calls; sandboxes add a filter of their own."""
    options = [option for option in info.security_options if option.startswith("name=seccomp")]
    if not options or "profile=unconfined" in options[0]:
        mend = f'use a kernel with seccomp, and leave "seccomp-profile" out {DAEMON}'
        return Check(name="seccomp", state="warning", found="the engine filters no system calls", mend=mend)
    return Check(name="seccomp", state="ok", found="the engine filters system calls")


def users(info: EngineInfo) -> Check:
    """Who root in a container is outside."""
    names = {option.partition(",")[0] for option in info.security_options}
    if names & {"name=rootless", "name=userns"}:
        return Check(name="engine users", state="ok", found="root in a container is not root of the machine")
    found = "root in a container is root of the machine; commands in sandboxes are user 10001"
    return Check(name="engine users", state="ok", found=found)


def cgroups(info: EngineInfo) -> Check:
    """Whether the limits of sandboxes can be kept."""
    if info.unlimited:
        found = f"the kernel of the engine cannot limit {', '.join(info.unlimited)}"
        mend = "switch the controllers on, e.g. cgroup_enable=memory swapaccount=1 on its command line"
        return Check(name="cgroups", state="warning", found=found, mend=mend)
    found = f"version {info.cgroup_version}: memory, swap, cpu and pids have limits"
    return Check(name="cgroups", state="ok", found=found)


def runtimes(info: EngineInfo, config: ServerConfig) -> Check:
    """What can run sandboxes."""
    found = f"{', '.join(info.runtimes) or 'none'}; sandboxes use {config.sandbox_runtime}"
    if config.sandbox_runtime not in info.runtimes:
        mend = f"install {config.sandbox_runtime} and name it {DAEMON}, or change sandbox_runtime"
        return Check(name="runtimes", state="problem", found=found, mend=mend)
    if GVISOR in info.runtimes and not reaches_sandboxes(info.runtimes[GVISOR]):
        mend = f'give it "runtimeArgs": ["--network=none", "--host-uds=all", "--host-fifo=open"] {DAEMON}'
        return Check(
            name="runtimes", state="warning", found=f"{found}; {GVISOR} lets nothing reach them", mend=mend
        )
    return Check(name="runtimes", state="ok", found=found)


def roots(info: EngineInfo, config: ServerConfig) -> Check:
    """What keeps commands of a sandbox with a writable root from filling the engine's disk."""
    name, ground = "sandbox roots", info.driver + (f" on {info.backing}" if info.backing else "")
    if "task" not in config.sandbox_profiles:
        return Check(name=name, state="ok", found="read-only: sandbox_profiles has no task")
    if info.limits_roots:
        only = ", where it is mounted with pquota" if info.backing else ""
        return Check(name=name, state="ok", found=f"as large as the workspace, by {ground}{only}")
    return Check(
        name=name,
        state="warning",
        found=f"not limited: the engine keeps them by {ground or 'a driver it does not name'}, which cannot do that; "
        "commands with profile task can fill its disk",
        mend="keep the engine's data on btrfs, zfs, or xfs mounted with pquota; or watch the room on its disk",
    )


def box_runtime(config: ServerConfig) -> Check:
    """What runs in the containers of others' images."""
    name, folder = "box runtime", Path(config.box_runtime or Path(config.data) / "runtime")
    if platform.libc_ver()[0] != "glibc" or platform.python_implementation() != "CPython":
        mend = "run the server with a CPython for Linux with glibc; without it there are no sandboxes"
        return Check(name=name, state="warning", found="this Python cannot be taken along", mend=mend)
    there = folder.is_dir() and any(folder.glob("*/bin"))
    return Check(
        name=name, state="ok", found=str(folder) if there else "will be made for the first sandbox, in 5 s"
    )


async def disk_limits() -> Check:
    """What keeps a sandbox from filling the disk."""
    with tempfile.TemporaryDirectory(prefix="agent-server-doctor-") as folder:
        disks = Disks(Path(folder))
        await disks.prepare()
    if disks.mechanism == "none":
        mend = (
            "let the server be root on a machine with loop devices and e2fsprogs; without, they have no limit"
        )
        return Check(name="sandbox disks", state="warning", found=disks.why, mend=mend)
    return Check(name="sandbox disks", state="ok", found=f"limited by {disks.mechanism}")
