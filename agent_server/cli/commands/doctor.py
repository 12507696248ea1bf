"""agent-server doctor: what works on this machine, and the mend for what does not. It changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import apsw
import msgspec

from agent_sdk import LLM, RemoteWorkspace
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.protocol.errors import AgentServerError
from agent_server.app import bound_to
from agent_server.cli.client import KEY_FILE
from agent_server.cli.engine_check import Check, State, examine_engine
from agent_server.cli.stdio import Outlet
from agent_server.cli.terminal import STDOUT, Style, json_line, one_line, open_terminal
from agent_server.config.options import ServerConfig, client_environment, load, load_given
from agent_server.config.sources import StartRefused
from agent_server.keys import obtain_keys, obtain_sealer
from agent_server.runtime_api.tenants import Tenants
from workspaces.box.confinement import confinement
from workspaces.box.process import BoxProcess

OLDEST_SQLITE = (3, 51, 3)
"""Older ones may corrupt a database with several connections at a checkpoint."""
FEW_BYTES, LITTLE_BYTES = 100 << 20, 1 << 30
OPEN_FILES = 4096
PROBE_SECONDS = 30.0

_STYLES: dict[State, Style] = {"ok": "green", "warning": "yellow", "problem": "red"}


async def main(given: argparse.Namespace) -> int:
    """Show all checks; 1 when there is a problem."""
    lines, terminal = Outlet(STDOUT), open_terminal()
    worst = 0
    async for check in examine(given):
        worst = max(worst, int(check.state == "problem"))
        if given.json:
            await lines.write(json_line(msgspec.json.encode(check)))
            continue
        await terminal.write(f"{check.state:<9}", _STYLES[check.state])
        mend = f" -> {check.mend}" if check.mend else ""
        await terminal.line(f"{check.name:<14}{one_line(check.found + mend)}")
    return worst


async def examine(given: argparse.Namespace) -> AsyncIterator[Check]:
    """Yield the checks as they are made."""
    config, configured = configuration(given)
    yield configured
    for look in (python, processes, sqlite, open_files):
        yield look()
    for tool in (bash, git):
        yield await tool()
    yield await box()
    for about in (data_folder, disk, server_key, secrets_key, tenants):
        yield about(config)
    yield await isolation(config)
    yield await port(config)
    yield model()
    yield colours()
    async for check in examine_engine(config):
        yield check


def configuration(given: argparse.Namespace) -> tuple[ServerConfig, Check]:
    """Read the server's options; with the defaults in their place when they are wrong."""
    try:
        config = load_given(given)
    except StartRefused as exc:
        broken = Check(
            name="configuration", state="problem", found=str(exc), mend="correct it; all else uses defaults"
        )
        return load(overrides={"data": given.data}, environ={}), broken
    found = f"http://{config.host}:{config.port}, data in {config.data}"
    if config.unknown:
        mend = "correct or unset it; agent-server config shows all options"
        return config, Check(
            name="configuration", state="warning", found=f"{found}; {'; '.join(config.unknown)}", mend=mend
        )
    return config, Check(name="configuration", state="ok", found=found)


def python() -> Check:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.release()}"
    return Check(name="python", state="ok", found=found)


def processes() -> Check:
    """What following processes needs of the kernel."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as exc:
        mend = "use Linux 5.3 or newer, in a container with a seccomp profile that allows pidfd_open"
        return Check(name="processes", state="problem", found=f"no pidfd: {exc}", mend=mend)
    if not Path("/proc/self/stat").exists():
        mend = "mount it: mount -t proc proc /proc"
        return Check(name="processes", state="problem", found="/proc is not mounted", mend=mend)
    return Check(name="processes", state="ok", found="/proc and pidfd work")


def sqlite() -> Check:
    """The database of the log."""
    version = apsw.sqlite_lib_version()
    if tuple(int(part) for part in version.split(".")) < OLDEST_SQLITE:
        mend = "update apsw: python -m pip install --upgrade apsw"
        return Check(name="sqlite", state="problem", found=f"SQLite {version} is too old", mend=mend)
    return Check(name="sqlite", state="ok", found=f"SQLite {version} through apsw {apsw.apsw_version()}")


def open_files() -> Check:
    """How many connections and files one process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "any number of" if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} open files, at most {most}"
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        mend = f"raise the limit for many connections: ulimit -Hn {OPEN_FILES} (or LimitNOFILE= of systemd)"
        return Check(name="open files", state="warning", found=found, mend=mend)
    return Check(name="open files", state="ok", found=found)


async def bash() -> Check:
    """What the terminal of agents is."""
    version = await _version("bash")
    if version is None:
        mend = "install bash, e.g. apt-get install bash"
        return Check(
            name="bash", state="problem", found="no bash on PATH: agents have no terminal", mend=mend
        )
    return Check(name="bash", state="ok", found=version)


async def git() -> Check:
    """What shows the changes of a workspace."""
    version = await _version("git")
    if version is None:
        mend = "install git, e.g. apt-get install git"
        return Check(
            name="git", state="warning", found="no git on PATH: changes and diffs are missing", mend=mend
        )
    return Check(name="git", state="ok", found=version)


async def box() -> Check:
    """Run a command the way a server does: in a box."""
    with tempfile.TemporaryDirectory(prefix="agent-server-doctor-") as folder:
        try:
            async with (
                asyncio.timeout(PROBE_SECONDS),
                BoxProcess(Path(folder), Path(folder) / "box", environment={"PATH": os.defpath}) as started,
                RemoteWorkspace(started.url, started.token) as workspace,
            ):
                result = await workspace.execute("echo it works")
        except (AgentServerError, OSError) as exc:
            mend = "report it with the line above; without a box no command runs"
            return Check(name="box", state="problem", found=str(exc) or "it does not answer", mend=mend)
    if result.stdout != "it works\n":
        found = f"a command in a box ended with {result.status} {result.reason}"
        return Check(
            name="box", state="problem", found=found, mend="see what bash says: bash -c 'echo it works'"
        )
    return Check(name="box", state="ok", found=f"a command ran in a box in {result.duration * 1000:.0f} ms")


def data_folder(config: ServerConfig) -> Check:
    """The folder of everything that lasts."""
    folder = Path(config.data)
    there = _nearest(folder)
    mend = "choose another one with --data or AGENT_SERVER_DATA"
    if not there.is_dir():
        return Check(name="data folder", state="problem", found=f"{there} is no folder", mend=mend)
    try:
        # Permissions alone do not tell: the file system may be read-only, full, or of another kind.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as exc:
        found = f"{there} cannot be written: {exc.strerror}"
        return Check(name="data folder", state="problem", found=found, mend=mend)
    state = "is there and can be written" if there == folder else "will be made at the first start"
    return Check(name="data folder", state="ok", found=f"{folder} {state}")


def disk(config: ServerConfig) -> Check:
    """Room for logs, output and workspaces."""
    free = shutil.disk_usage(_nearest(Path(config.data))).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < LITTLE_BYTES:
        state: State = "problem" if free < FEW_BYTES else "warning"
        return Check(
            name="disk", state=state, found=found, mend="make room, or choose another disk with --data"
        )
    return Check(name="disk", state="ok", found=found)


def server_key(config: ServerConfig) -> Check:
    """The API key of the server."""
    file = Path(config.data) / KEY_FILE
    if not (config.api_key or config.api_key_file or config.api_keys_file or os.path.lexists(file)):
        return Check(name="server key", state="ok", found=f"will be made at the first start: {file}")
    try:
        key, _ = obtain_keys(config)
    except StartRefused as exc:
        return _refused("server key", exc)
    return Check(name="server key", state="ok", found=str(key.file or "set by the configuration"))


def secrets_key(config: ServerConfig) -> Check:
    """What models' keys are kept with."""
    try:
        sealer, keys = obtain_sealer(config)
    except StartRefused as exc:
        return _refused("secrets key", exc)
    if sealer is None:
        found = "none is set: after a restart conversations wait until a client brings the model's key again"
        mend = "set secrets_key, or secrets_key_file, e.g. with what `openssl rand -base64 32` prints"
        return Check(name="secrets key", state="warning", found=found, mend=mend)
    return Check(name="secrets key", state="ok", found=f"{len(keys)} set by the configuration")


async def isolation(config: ServerConfig) -> Check:
    """How boxes are kept apart from the server."""
    kind = config.isolation
    if kind == "none":
        found = "none: commands can do what the server's user can, and read its keys"
        mend = "set isolation to user or bwrap, or use sandboxes, before others' code runs here"
        return Check(name="isolation", state="warning", found=found, mend=mend)
    try:
        # Beside the data folder, which may not be there yet: whoever may not pass there may not here.
        with tempfile.TemporaryDirectory(
            prefix="agent-server-doctor-", dir=_nearest(Path(config.data).parent)
        ) as folder:
            for passage in (folder, os.path.join(folder, "workspaces")):
                os.makedirs(passage, exist_ok=True)
                os.chmod(passage, 0o711)
            await (await confinement(kind, config.box_user, Path(folder))).check(Path(folder))
    except (AgentServerError, OSError) as exc:
        return _refused("isolation", exc)
    return Check(name="isolation", state="ok", found=f"{kind}: a box can be started like this")


def tenants(config: ServerConfig) -> Check:
    """Who may use the Runtime API."""
    if config.runtime_api == "off":
        return Check(name="runtime api", state="ok", found="off")
    try:
        count = len(Tenants(config.runtimes, "").secrets)
    except StartRefused as exc:
        return _refused("runtime api", exc)
    return Check(name="runtime api", state="ok", found=f"{config.runtime_api}, tenants: {count}")


def colours() -> Check:
    """What terminals look like."""
    if find_spec("rich") is None:
        mend = "python -m pip install 'remote-agent-server[cli]'"
        return Check(name="colours", state="warning", found="none: rich is not installed", mend=mend)
    return Check(name="colours", state="ok", found="rich is installed")


async def port(config: ServerConfig) -> Check:
    """Where the server would listen."""
    where = f"{config.host} port {config.port}"
    try:
        bound_to(config.host, config.port).close()
    except StartRefused as exc:
        if config.port and await _is_agent_server(config):
            return Check(name="port", state="ok", found=f"an agent server is running on {where}")
        return _refused("port", exc)
    return Check(name="port", state="ok", found=f"{where} is free")


def model() -> Check:
    """The model that `run` would use."""
    mend = "set LLM_MODEL (e.g. openai/gpt-5.5) and LLM_API_KEY, or use --script"
    environment = client_environment().llm
    if not environment.get("LLM_MODEL"):
        return Check(name="model", state="warning", found="LLM_MODEL is not set", mend=mend)
    try:
        address = address_of(LLM.from_env(environment))
    except AgentServerError as exc:
        return Check(name="model", state="warning", found=str(exc), mend=mend)
    if not environment.get("LLM_API_KEY") and not environment.get("LLM_BASE_URL"):
        return Check(name="model", state="warning", found=f"no LLM_API_KEY for {address.host}", mend=mend)
    return Check(name="model", state="ok", found=f"{address.model} at {address.host} (not asked)")


def _refused(name: str, exc: Exception) -> Check:
    """What would keep the server from starting, in its own words."""
    found, _, mend = str(exc).rpartition("; ")
    if not found:
        found, mend = mend, "correct the configuration, or what it names"
    return Check(name=name, state="problem", found=found, mend=mend)


async def _version(program: str) -> str | None:
    """The first line of `program --version`; None when it does not start."""
    try:
        process = await asyncio.create_subprocess_exec(
            program, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
    except OSError:
        return None
    said, _ = await process.communicate()
    return said.decode(errors="replace").partition("\n")[0] if process.returncode == 0 else None


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
    """The folder, or what stands where its way ends."""
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))
