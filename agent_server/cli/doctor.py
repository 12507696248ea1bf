"""agent-server doctor: what works on this machine, and the mend for what does not. It changes nothing.

Each row of CHECKS is one thing to look at; where `serve` has a step of its own for it, the check takes that very step,
and what it refuses is a problem in the same words. Rows of ENGINE look at the container engine, which only containers
need: there nothing is a problem but a wrong option.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import platform
import re
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import aiohttp
import apsw
import msgspec
from msgspec import Struct

from agent_sdk import LLM, RemoteWorkspace
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable
from agent_server.app import bound_to
from agent_server.cli.client import KEY_FILE
from agent_server.cli.terminal import STDOUT, Outlet, Style, json_line, one_line, open_terminal
from agent_server.config.options import ServerConfig, client_environment, load, load_given
from agent_server.config.sources import StartRefused
from agent_server.keys import obtain_keys, obtain_sealer
from agent_server.runtime_api.service import Tenants
from workspaces.backend.disks import Disks
from workspaces.backend.docker.engine import Engine, EngineInfo
from workspaces.backend.docker.engine_info import GVISOR, reaches_sandboxes
from workspaces.box.confinement import confinement
from workspaces.box.process import BoxProcess

OLDEST_SQLITE = (3, 51, 3)
"""Older ones may corrupt a database with several connections at a checkpoint."""
FEW_BYTES, LITTLE_BYTES = 100 << 20, 1 << 30
OPEN_FILES = 4096
PROBE_SECONDS = 30.0
SAFE_RUNC = {(1, 2): 8, (1, 3): 3}
"""The first patch releases with the fixes of CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881; later lines have
them, earlier ones do not."""
DAEMON = "in /etc/docker/daemon.json"
SCRATCH = "agent-server-doctor-"

State = Literal["ok", "warning", "problem"]
_STYLES: Mapping[State, Style] = {"ok": "green", "warning": "yellow", "problem": "red"}


class Finding(Struct, frozen=True):
    """What one thing is like that was looked at."""

    state: State
    """`warning`: something is missing that not everybody needs; `problem`: a server would not work."""
    found: str
    mend: str = ""
    """What to do; empty when all is well."""


ok, warning, problem = (partial(Finding, state) for state in ("ok", "warning", "problem"))


def either(well: object, found: str, lacking: str, mend: str) -> Finding:
    """Return that all is well, or that something is missing that not everybody needs."""
    return ok(found) if well else warning(lacking, mend)


async def doctor(given: argparse.Namespace) -> int:
    """Show all checks; 1 when there is a problem."""
    lines, terminal = Outlet(STDOUT), open_terminal()
    worst = 0
    async for name, check in examine(given):
        worst = max(worst, int(check.state == "problem"))
        if given.json:
            shown = {"name": name, **msgspec.structs.asdict(check)}
            await lines.write(json_line(msgspec.json.encode(shown)))
            continue
        await terminal.write(f"{check.state:<9}", _STYLES[check.state])
        mend = f" -> {check.mend}" if check.mend else ""
        await terminal.line(f"{name:<14}{one_line(check.found + mend)}")
    return worst


async def examine(given: argparse.Namespace) -> AsyncIterator[tuple[str, Finding]]:
    """Yield the checks as they are made, each with its name."""
    config, configured = configuration(given)
    yield "configuration", configured
    for name in CHECKS:
        yield name, await look(name, config)
    async for check in examine_engine(config):
        yield check


async def look(name: str, config: ServerConfig) -> Finding:
    """Make one check of CHECKS; what would keep a server from starting is a problem, in its own words."""
    try:
        finding = CHECKS[name](config)
        return await finding if inspect.isawaitable(finding) else finding
    except (StartRefused, AgentServerError, OSError) as exc:
        found, _, mend = str(exc).rpartition("; ")
        return problem(found, mend) if found else problem(mend, "correct the configuration, or what it names")


def configuration(given: argparse.Namespace) -> tuple[ServerConfig, Finding]:
    """Read the server's options; with the defaults in their place when they are wrong."""
    try:
        config = load_given(given)
    except StartRefused as exc:
        broken = problem(str(exc), "correct it; all else uses defaults")
        return load(overrides={"data": given.data}, environ={}), broken
    found = f"http://{config.host}:{config.port}, data in {config.data}"
    mend = "correct or unset it; agent-server config shows all options"
    return config, either(not config.unknown, found, "; ".join([found, *config.unknown]), mend)


# --- this machine ---


def _python(config: ServerConfig) -> Finding:
    return ok(f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.release()}")


def _processes(config: ServerConfig) -> Finding:
    """Check what following processes needs of the kernel."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as exc:
        mend = "use Linux 5.3 or newer, in a container with a seccomp profile that allows pidfd_open"
        return problem(f"no pidfd: {exc}", mend)
    if not Path("/proc/self/stat").exists():
        return problem("/proc is not mounted", "mount it: mount -t proc proc /proc")
    return ok("/proc and pidfd work")


def _sqlite(config: ServerConfig) -> Finding:
    version = apsw.sqlite_lib_version()
    if tuple(int(part) for part in version.split(".")) < OLDEST_SQLITE:
        return problem(f"SQLite {version} is too old", "update apsw: python -m pip install --upgrade apsw")
    return ok(f"SQLite {version} through apsw {apsw.apsw_version()}")


def _open_files(config: ServerConfig) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "any number of" if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} open files, at most {most}"
    mend = f"raise the limit for many connections: ulimit -Hn {OPEN_FILES} (or LimitNOFILE= of systemd)"
    return either(hard == resource.RLIM_INFINITY or hard >= OPEN_FILES, found, found, mend)


async def _program(name: str, state: State, without: str) -> Finding:
    """Check a program that agents use: show the first line of `name --version`."""
    missing = Finding(state, f"no {name} on PATH: {without}", f"install {name}, e.g. apt-get install {name}")
    try:
        process = await asyncio.create_subprocess_exec(
            name, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
    except OSError:
        return missing
    said, _ = await process.communicate()
    return ok(said.decode(errors="replace").partition("\n")[0]) if process.returncode == 0 else missing


async def _box(config: ServerConfig) -> Finding:
    """Run a command the way a server does: in a box."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        try:
            async with (
                asyncio.timeout(PROBE_SECONDS),
                BoxProcess(Path(folder), Path(folder) / "box", environment={"PATH": os.defpath}) as started,
                RemoteWorkspace(started.url, started.token) as workspace,
            ):
                result = await workspace.execute("echo it works")
        except (AgentServerError, OSError) as exc:
            mend = "report it with the line above; without a box no command runs"
            return problem(str(exc) or "it does not answer", mend)
    if result.stdout != "it works\n":
        found = f"a command in a box ended with {result.status} {result.reason}"
        return problem(found, "see what bash says: bash -c 'echo it works'")
    return ok(f"a command ran in a box in {result.duration * 1000:.0f} ms")


# --- what serve is told ---


def _data_folder(config: ServerConfig) -> Finding:
    folder = config.folder
    there = _nearest(folder)
    mend = "choose another one with --data or AGENT_SERVER_DATA"
    if not there.is_dir():
        return problem(f"{there} is no folder", mend)
    try:
        # Permissions alone do not tell: the file system may be read-only, full, or of another kind.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as exc:
        return problem(f"{there} cannot be written: {exc.strerror}", mend)
    return ok(
        f"{folder} {'is there and can be written' if there == folder else 'will be made at the first start'}"
    )


def _disk(config: ServerConfig) -> Finding:
    free = shutil.disk_usage(_nearest(config.folder)).free
    found = f"{free / 2**30:.1f} GiB free"
    if free >= LITTLE_BYTES:
        return ok(found)
    mend = "make room, or choose another disk with --data"
    return problem(found, mend) if free < FEW_BYTES else warning(found, mend)


def _server_key(config: ServerConfig) -> Finding:
    file = config.folder / KEY_FILE
    if not (config.api_key or config.api_key_file or config.api_keys_file or os.path.lexists(file)):
        return ok(f"will be made at the first start: {file}")
    return ok(str(obtain_keys(config)[0].file or "set by the configuration"))


def _secrets_key(config: ServerConfig) -> Finding:
    sealer, keys = obtain_sealer(config)
    return either(
        sealer,
        f"{len(keys)} set by the configuration",
        "none is set: after a restart conversations wait until a client brings the model's key again",
        "set secrets_key, or secrets_key_file, e.g. with what `openssl rand -base64 32` prints",
    )


def _tenants(config: ServerConfig) -> Finding:
    if config.runtime_api == "off":
        return ok("off")
    return ok(f"{config.runtime_api}, tenants: {len(Tenants(config.runtimes, '').secrets)}")


async def _isolation(config: ServerConfig) -> Finding:
    if config.isolation == "none":
        return warning(
            "none: commands can do what the server's user can, and read its keys",
            "set isolation to user or bwrap, or use sandboxes, before others' code runs here",
        )
    # Beside the data folder, which may not be there yet: whoever may not pass there may not here.
    place = _nearest(config.folder.parent)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place) as folder:
        for passage in (folder, os.path.join(folder, "workspaces")):
            os.makedirs(passage, exist_ok=True)
            os.chmod(passage, 0o711)
        await (await confinement(config.isolation, config.box_user, Path(folder))).check(Path(folder))
    return ok(f"{config.isolation}: a box can be started like this")


async def _port(config: ServerConfig) -> Finding:
    where = f"{config.host} port {config.port}"
    try:
        bound_to(config.host, config.port).close()
    except StartRefused:
        if config.port and await _is_agent_server(config):
            return ok(f"an agent server is running on {where}")
        raise
    return ok(f"{where} is free")


async def _is_agent_server(config: ServerConfig) -> bool:
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
            session.get(f"http://{host}:{config.port}/health") as answer,
        ):
            return answer.status == 200 and answer.headers.get("Server") == "agent-server"
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


def _nearest(folder: Path) -> Path:
    """Return the folder, or what stands where its way ends."""
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


# --- what is beside it ---


def _model(config: ServerConfig) -> Finding:
    mend = "set LLM_MODEL (e.g. openai/gpt-5.5) and LLM_API_KEY, or use --script"
    environment = client_environment().llm
    if not environment.get("LLM_MODEL"):
        return warning("LLM_MODEL is not set", mend)
    try:
        address = address_of(LLM.from_env(environment))
    except AgentServerError as exc:
        return warning(str(exc), mend)
    if not environment.get("LLM_API_KEY") and not environment.get("LLM_BASE_URL"):
        return warning(f"no LLM_API_KEY for {address.host}", mend)
    return ok(f"{address.model} at {address.host} (not asked)")


CHECKS: Mapping[str, Callable[[ServerConfig], Finding | Awaitable[Finding]]] = {
    "python": _python,
    "processes": _processes,
    "sqlite": _sqlite,
    "open files": _open_files,
    "bash": lambda config: _program("bash", "problem", "agents have no terminal"),
    "git": lambda config: _program("git", "warning", "changes and diffs are missing"),
    "box": _box,
    "data folder": _data_folder,
    "disk": _disk,
    "server key": _server_key,
    "secrets key": _secrets_key,
    "runtime api": _tenants,
    "isolation": _isolation,
    "port": _port,
    "model": _model,
    "colours": lambda config: either(
        find_spec("rich"),
        "rich is installed",
        "none: rich is not installed",
        "python -m pip install 'remote-agent-server[cli]'",
    ),
}
"""What is looked at after the configuration, by name."""


# --- the container engine ---


async def examine_engine(config: ServerConfig) -> AsyncIterator[tuple[str, Finding]]:
    """Yield the checks of the engine; one alone when there is none."""
    try:
        async with Engine(config.engine or None) as engine:
            info, where = engine.info, engine.where
    except EngineUnavailable as exc:
        sentence, _, mend = str(exc).rpartition(": ")
        if config.runtime_api == "docker":
            yield "docker", problem(f"runtime_api is docker: {sentence}", mend)
        else:
            yield "docker", warning(sentence, f"{mend}; only containers need it")
        return
    yield "docker", ok(f"engine {info.version}, API {info.api}, {info.os}/{info.arch}")
    yield "engine socket", _address(where)
    for name, check in ENGINE.items():
        yield name, check(info, config)
    yield "sandbox disks", await _disk_limits()


def _address(where: str) -> Finding:
    """Check who may use the engine, and so is root on its machine."""
    if where.startswith("https://"):
        return ok(f"{where}, over TLS")
    if not where.startswith("unix://"):
        mend = "use its Unix socket, or TLS: whoever reaches the port is root on its machine"
        return warning(f"{where} asks for no certificate", mend)
    path = Path(where.removeprefix("unix://"))
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        return warning(f"{path}: {exc.strerror}", "look at DOCKER_HOST")
    if mode & stat.S_IWOTH:
        mend = f"chmod 660 {path}: whoever may write to it is root on this machine"
        return warning(f"all users may use {path}", mend)
    return ok(f"{path}, mode {stat.S_IMODE(mode):o}")


def _option(info: EngineInfo, name: str, without: str = "") -> str:
    """Return what the engine says of one of its ways to secure containers."""
    said = (option for option in info.security_options if option.partition(",")[0] == f"name={name}")
    return next(said, without)


def _runc(info: EngineInfo, config: ServerConfig) -> Finding:
    """Check whether known ways out of a container are closed."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", info.runc)
    if numbers is None:
        return ok(f"version {info.runc or 'not known'}: not compared")
    major, minor, patch = map(int, numbers.groups())
    return either(
        (major, minor) >= min(SAFE_RUNC) and patch >= SAFE_RUNC.get((major, minor), 0),
        info.runc,
        f"{info.runc} may lack the fixes of CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881",
        "update it to 1.2.8, 1.3.3 or newer, unless your distribution has fixed it; or use runsc",
    )


def _runtimes(info: EngineInfo, config: ServerConfig) -> Finding:
    """Check what can run sandboxes."""
    found, runtime = (
        f"{', '.join(info.runtimes) or 'none'}; sandboxes use {config.sandbox_runtime}",
        config.sandbox_runtime,
    )
    if runtime not in info.runtimes:
        return problem(found, f"install {runtime} and name it {DAEMON}, or change sandbox_runtime")
    if GVISOR in info.runtimes and not reaches_sandboxes(info.runtimes[GVISOR]):
        mend = f'give it "runtimeArgs": ["--network=none", "--host-uds=all", "--host-fifo=open"] {DAEMON}'
        return warning(f"{found}; {GVISOR} lets nothing reach them", mend)
    return ok(found)


def _roots(info: EngineInfo, config: ServerConfig) -> Finding:
    """Check what keeps commands of a sandbox with a writable root from filling the engine's disk."""
    if "task" not in config.sandbox_profiles:
        return ok("read-only: sandbox_profiles has no task")
    ground = info.driver + (f" on {info.backing}" if info.backing else "")
    return either(
        info.limits_roots,
        f"as large as the workspace, by {ground}{', where it is mounted with pquota' if info.backing else ''}",
        f"not limited: the engine keeps them by {ground or 'a driver it does not name'}, which cannot do that; "
        "commands with profile task can fill its disk",
        "keep the engine's data on btrfs, zfs, or xfs mounted with pquota; or watch the room on its disk",
    )


def _box_runtime(info: EngineInfo, config: ServerConfig) -> Finding:
    """Check what runs in the containers of others' images."""
    if platform.libc_ver()[0] != "glibc" or platform.python_implementation() != "CPython":
        mend = "run the server with a CPython for Linux with glibc; without it there are no sandboxes"
        return warning("this Python cannot be taken along", mend)
    folder = config.box_runtimes or config.folder / "runtime"
    there = folder.is_dir() and any(folder.glob("*/bin"))
    return ok(str(folder) if there else "will be made for the first sandbox, in 5 s")


async def _disk_limits() -> Finding:
    """Check what keeps a sandbox from filling the disk."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        disks = Disks(Path(folder))
        await disks.prepare()
    mend = "let the server be root on a machine with loop devices and e2fsprogs; without, they have no limit"
    return either(disks.mechanism != "none", f"limited by {disks.mechanism}", disks.why, mend)


ENGINE: Mapping[str, Callable[[EngineInfo, ServerConfig], Finding]] = {
    "live restore": lambda info, config: either(
        info.live_restore,
        "containers go on while the engine restarts",
        "containers end with the engine, e.g. at its update",
        f'set "live-restore": true {DAEMON}',
    ),
    "engine logs": lambda info, config: either(
        info.logging_driver != "json-file",
        info.logging_driver or "not known",
        "the engine's default, json-file, has no limit unless one was set",
        f'set "log-driver": "local" {DAEMON}, or log-opts with max-size; containers of ours have limits',
    ),
    "runc": _runc,
    "seccomp": lambda info, config: either(
        "profile=unconfined" not in _option(info, "seccomp", "profile=unconfined"),
        "the engine filters system calls",  # sandboxes add a filter of their own
        "the engine filters no system calls",
        f'use a kernel with seccomp, and leave "seccomp-profile" out {DAEMON}',
    ),
    "engine users": lambda info, config: ok(
        "root in a container is not root of the machine"
        if _option(info, "rootless") or _option(info, "userns")
        else "root in a container is root of the machine; commands in sandboxes are user 10001"
    ),
    "cgroups": lambda info, config: either(
        not info.unlimited,
        f"version {info.cgroup_version}: memory, swap, cpu and pids have limits",
        f"the kernel of the engine cannot limit {', '.join(info.unlimited)}",
        "switch the controllers on, e.g. cgroup_enable=memory swapaccount=1 on its command line",
    ),
    "runtimes": _runtimes,
    "sandbox roots": _roots,
    "box runtime": _box_runtime,
}
"""What is looked at in an engine that answers, by name."""
