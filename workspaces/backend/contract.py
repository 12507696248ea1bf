"""What a place that runs machines promises: an engine of containers, this machine's processes, a cluster.

A machine is described by plain data and has a name of its own, chosen before it is made. So whoever is killed at
whichever moment: making it again finds it, and what nobody has on record is found by its labels.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from msgspec import Struct

from agent_sdk.protocol.errors import InvalidParams
from agent_sdk.protocol.results import Usage

KEY_NAME = "AGENT_SERVER_API_KEY"
"""The variable in which an agent server finds its key."""
SERVER_PORT = 8000
"""Where an agent server listens in its machine."""
SERVER_LEAST_MEMORY = 64 << 20
LEAST_CPUS, MOST_CPUS = 0.01, 1024
UID = 10001
"""Of whatever runs in the machine of a box, as its user and its group; in that of a task its commands choose."""
HOSTNAME = "sandbox"
"""Of the machine of a box."""
WORKSPACE, FOLDER, OUTPUT, RUNTIME = "/workspace", "/run/agent", "/run/agent-output", "/opt/agent"
"""What is mounted into the machine of a box: its workspace, its socket, what commands say, and what it runs."""
TEMPORARY = ("/run",)
"""What every machine of a box has besides, in memory."""
KERNEL = ("/proc", "/sys", "/dev")
LEAST_MEMORY = "32m"
"""Of the machine of a box."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}")
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

Can = Literal["freeze", "folders", "disk_limit", "isolate", "snapshot", "migrate"]
"""`freeze`: what is paused keeps its memory. `folders`: folders of the client's machine can be mounted.
`disk_limit`: what is stored can be limited. `isolate`: a machine can have a `runtime` of its own."""
Profile = Literal["server", "box", "task"]
"""Which hardening a machine gets. `server`: it runs an agent server, and commands as other users than that. `box`: it
runs a box, as one user without capabilities, and its root is read-only. `task`: so does it, but its root is that of the
image and writable, and commands may be run as anybody."""
State = Literal["created", "running", "paused", "ended", "data"]
"""`data`: nothing is left of it but what it has stored."""
Cause = Literal["exit", "oom", "killed", "engine"]
"""`engine`: it was removed, or nobody knows."""
Pull = Literal["missing", "always", "never"]
OnProgress = Callable[[str, int, int | None], object]
"""Called with the phase (`engine`, `pull`, `create`, `start`, `ready`), how much of it is done, and of how much."""


class Mount(Struct, frozen=True):
    """A folder of the backend's machine, or a volume that exists, and where it is in the machine."""

    source: str
    target: str
    read_only: bool = False
    here: bool = False
    """Whether the source is named as this process sees it, which a backend may see elsewhere."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.source.startswith("/")

    @classmethod
    def parse(cls, text: str) -> Mount:
        """Read `/host:/in[:ro]` or `name:/in[:ro]`.

        Raises:
            InvalidParams: it is neither.
        """
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if not target.startswith("/") or target.rstrip("/") == "" or mode not in ("", "ro", "rw"):
            raise InvalidParams(f"volumes: {text!r} must look like /host/folder:/folder or name:/folder[:ro]")
        if not source.startswith("/") and not NAME.fullmatch(source):
            raise InvalidParams(
                f"volumes: {source!r} is neither an absolute path nor the name of a volume; "
                "a folder is written with its whole path"
            )
        return cls(source, target, mode == "ro")


class Storage(Struct, frozen=True):
    """What a machine stores: kept while it is paused, ended or made again, and removed with it."""

    target: str
    """The folder in the machine."""
    size: int | None = None
    """Bytes that it may take, where the backend can limit them; None: no limit."""


class Image(Struct, frozen=True, kw_only=True):
    """An image that is there, as far as the backend can look into it."""

    name: str
    """As it was asked for."""
    id: str
    """Of its content: another image that gets its name has another one."""
    digest: str = ""
    """By which a registry knows it; empty for one that was made here."""
    os: str = ""
    arch: str = ""
    size: int = 0
    """Bytes."""
    volumes: tuple[str, ...] = ()
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""


Look = Callable[[str, int], Awaitable[tuple[str, bytes]]]
"""Called with a path of an image and a number of bytes: returns where the path leads to, and the content if that is a
file that is not longer. Raises NotFound."""


class Machine(Struct, frozen=True, kw_only=True):
    """What a machine is to be, in no engine's words. One that makes no sense cannot be described."""

    name: str
    labels: Mapping[str, str]
    """By which it is found again; at least the one of its owner."""
    profile: Profile = "server"
    """Which hardening it gets."""
    image: str = ""
    platform: str | None = None
    """E.g. `linux/amd64`; None: the backend's own."""
    pull: Pull = "missing"
    command: tuple[str, ...] | None = None
    """Run instead of what the image says."""
    working_dir: str | None = None
    """Of that command."""
    user: int | None = None
    """Of that command; None: the image's."""
    group: int | None = None
    """A further group of its process, which may write what is mounted and stored."""
    env: Mapping[str, str] = {}
    without_env: tuple[str, ...] = ()
    """Variables of the image that it does not get: a LD_PRELOAD would be obeyed before any of our code runs."""
    secret_env: Mapping[str, str] = {}
    """What nobody but the machine should see, where the backend can hide it."""
    cpus: float | None = None
    memory: int | None = None
    """Bytes, without swap; None: no limit."""
    pids: int | None = None
    """Processes and threads at a time; None: 4096."""
    gpus: str | None = None
    """`all`, a number, or ids separated by commas."""
    runtime: str | None = None
    """The backend's word for how it is isolated, e.g. `runsc`; None: its default."""
    mounts: tuple[Mount, ...] = ()
    volumes: tuple[str, ...] = ()
    """Folders with what the image has there, which are writable and go with it."""
    root_size: int | None = None
    """Bytes that it may write into its root, where that is writable; None: no limit."""
    storage: Storage | None = None
    ports: tuple[int, ...] = (SERVER_PORT,)
    """What `endpoint` leads to; the first is the server's."""
    host_port: int | None = None
    """Where the first of them is published on the backend's machine; None: anywhere."""
    network: str | None = None
    """One that exists; None: the backend's default."""

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            InvalidParams: it makes no sense; the sentence names the field.
        """
        if not NAME.fullmatch(self.name):
            raise InvalidParams(
                f"name: {self.name!r} is no name of a container; use letters, digits, dots, - and _"
            )
        if self.profile != "server":
            return  # a Sandbox has checked the rest
        if self.memory is not None and self.memory < SERVER_LEAST_MEMORY:
            raise InvalidParams(f"memory: {self.memory} bytes are too few; give it 64m or more")
        if self.cpus is not None and not LEAST_CPUS <= self.cpus <= MOST_CPUS:
            raise InvalidParams(f"cpus: {self.cpus} must be between {LEAST_CPUS} and {MOST_CPUS}")
        if self.pids is not None and not 32 <= self.pids <= 1 << 22:
            raise InvalidParams(f"pids: {self.pids} must be between 32 and {1 << 22}")

    def __repr__(self) -> str:
        return f"Machine({self.name})"


class Ready(Struct, frozen=True, kw_only=True):
    """What a server says when it accepts connections; with `--json` as a line of its standard output."""

    url: str
    api_key_file: str | None
    """Where the key is; None: in the configuration."""
    pid: int


class Ending(Struct, frozen=True):
    """How a machine has ended."""

    cause: Cause
    exit_code: int | None
    """Negative for a signal where the backend tells it so; None: nobody knows it any more."""
    reason: str
    """As words."""
    words: str = ""
    """The end of what it wrote, as one line."""

    @property
    def said(self) -> str:
        """Return the reason with the last words, as the end of a sentence."""
        return f"{self.reason}{said(self.words)}"


class Found(Struct, frozen=True):
    """One machine that there is."""

    id: str
    name: str
    labels: Mapping[str, str]
    state: State


class Facts(Found, frozen=True, kw_only=True):
    """What a backend knows of a machine."""

    image: str
    env: Mapping[str, str]
    """With what is secret: whoever may ask the backend can read it anyway."""
    network: str | None


class Backend(Protocol):
    """A place that runs machines. Every call is bounded in time, and a cancel leaves nothing half done.

    Everywhere an id is what `create` returned, or the machine's name. Beside what is listed, every call raises
    EngineUnavailable when the backend does not answer.
    """

    can: frozenset[Can]
    """What it is able to do; asked first: nothing weaker is taken instead."""
    cpus: int
    """Of the machine it runs on; 0: nobody knows."""
    memory: int
    """Bytes of that machine; 0: nobody knows."""
    root_limit: str
    """What limits the writable root of a machine; empty: nothing does."""
    own_kernels: frozenset[str]
    """Values of `Machine.runtime` that give a machine a kernel of its own, which says other things of itself."""
    unseen: str
    """Why it does not see what is mounted on this machine; empty: it does."""

    def check_runtime(self, name: str) -> None:
        """Check that machines can be isolated like that.

        Raises:
            IsolationUnavailable: they cannot; no other way takes its place.
        """
        ...

    async def image(self, name: str, *, pull: Pull = "missing", platform: str | None = None) -> Image:
        """Return an image, had from where it is kept if it is missing or another one is wanted.

        Raises:
            ImageUnavailable: it is not there and cannot be had.
        """
        ...

    def looking(self, image: Image) -> AbstractAsyncContextManager[Look]:
        """Look into an image of which nothing runs, for the length of a block."""
        ...

    async def create(self, machine: Machine, on_progress: OnProgress | None = None) -> str:
        """Make a machine that does not run yet, and return its id; one of this name and owner is taken as it is.

        A failure or a cancel leaves none, but what it has stored before.

        Raises:
            ImageUnavailable: the image is not there and cannot be had.
            IsolationUnavailable: the backend cannot give what was asked for.
            InvalidParams: a network, a volume or a path that cannot be used.
            WorkspaceUnavailable: the name is somebody else's, …
        """
        ...

    async def differences(self, id: str, machine: Machine) -> list[str]:
        """Return in what it is another one than was described, by the backend's account, one phrase each."""
        ...

    async def start(self, id: str) -> None:
        """Make it run, whatever it does: one that is paused or has ended goes on, one that runs is fine.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it cannot be started; with phase.
        """
        ...

    async def wait(self, id: str) -> Ending:
        """Wait until it has ended; for one that has already it returns at once. Cancelling ends the waiting only."""
        ...

    async def endpoint(self, id: str, port: int) -> str:
        """Return where one of its ports is reached, as a URL that is valid as long as it runs.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it does not run, or was not given that port.
        """
        ...

    async def pause(self, id: str) -> None:
        """Let nothing in it run until `resume` or `start`; where it cannot `freeze` it ends.

        One that is paused already, has ended or is gone is fine.
        """
        ...

    async def resume(self, id: str) -> None:
        """Let one that is paused go on; one that runs is fine.

        Raises:
            NotFound: there is none. WorkspaceUnavailable: it has ended.
        """
        ...

    async def stop(self, id: str, *, grace: float = 0, keep_data: bool = False) -> None:
        """End it and remove all of it. One that has ended or is gone is fine.

        Args:
            id: of the machine.
            grace: seconds that it may take to end by itself.
            keep_data: leave it so that it can be started again with what it has written.
        """
        ...

    async def list(self, labels: Mapping[str, str | None]) -> list[Found]:
        """Return the machines with these labels, with any value where that is None, whatever their state."""
        ...

    def events(self, labels: Mapping[str, str | None]) -> AsyncIterator[Found]:
        """Yield the machines with these labels: all there are, and from then on each whenever its state has changed.

        All are told again when something may have been missed. Close the iterator to end it.
        """
        ...

    async def usage(self, id: str) -> Usage:
        """Return what it uses at this moment, as far as somebody knows.

        Raises:
            NotFound: there is none.
        """
        ...

    async def inspect(self, id: str) -> Facts:
        """Return what is known of it.

        Raises:
            NotFound: there is none.
        """
        ...

    async def logs(self, id: str, lines: int = 20) -> str:
        """Return the last lines of what it wrote; empty when there is nothing, or nobody knows."""
        ...


def said(words: str) -> str:
    """Return last words as the end of a sentence."""
    return f"; it said: {words}" if words else "; it said nothing"


def one_line(lines: str) -> str:
    """Return what was written in several lines as one, for a sentence."""
    return " | ".join(line.strip() for line in lines.splitlines() if line.strip())


def parse_size(field: str, text: str, *, least: str = "1b") -> int:
    """Return bytes for a number with a unit of `b`, `k`, `m`, `g` or `t` (powers of 1024).

    Raises:
        InvalidParams: it is no size, or below `least`; the sentence names the field.
    """
    size = _bytes(text)
    if size is None:
        raise InvalidParams(f"{field}: {text[:64]!r} is no size; write a number and a unit, like 512m")
    if size < (_bytes(least) or 0):
        raise InvalidParams(f"{field}: {text} is too small; give it {least} or more")
    return size


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([bkmgt]?)(?:i?b)?", text.strip().lower())
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
