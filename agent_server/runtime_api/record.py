"""What a tenant may have, what is asked for in a runtime and kept of it, and the machine that its server runs in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from agent_sdk.protocol.checks import whole
from agent_sdk.workspace.environment import packed
from agent_server.config.options import Quota
from workspaces.backend.contract import (
    KEY_NAME,
    LEAST_CPUS,
    MOST_CPUS,
    SERVER_PORT,
    Machine,
    Pull,
    Storage,
)

RECORD = "session.json"
PREFIX = "agent-server-"
"""Begins the name of the machine of a runtime."""
OUR_START = "/opt/agent-server/bin/start"
"""How the command of our own image begins."""
KEY_NAMES = (KEY_NAME, "SESSION_API_KEY", "OH_SESSION_API_KEYS_0")
"""Where servers look for their key, ours and others."""
DATA = "/data"
"""Where the server in the image keeps what lasts."""
PULL: Mapping[str, Pull] = {"IfNotPresent": "missing", "Always": "always", "Never": "never"}
FOR_OTHERS = ("AGENT_SERVER_COMMAND_ENV", "AGENT_SERVER_ALLOW_HOSTS")
"""What clients set for other Runtime APIs, which hand variables to the server alone, and pass on its Host."""
_Name = Annotated[
    str,
    Meta(pattern=rf"^(({'|'.join(FOR_OTHERS)})$|(?!AGENT_SERVER_)[A-Za-z_][A-Za-z0-9_]*$)", max_length=256),
]
_Value = Annotated[str, Meta(pattern=r"^[^\0]*$")]
_TEXT = Meta(pattern=r"^[^\0]+$", max_length=65_536)
_User = Annotated[int, Meta(ge=0, le=2_147_483_647)]


class Tenant(Quota, frozen=True, kw_only=True):
    """One tenant of the Runtime API with its quota."""

    name: str


class Wanted(Struct, frozen=True, kw_only=True):
    """The body of `POST /start`. Further members are for other Runtime APIs and not looked at."""

    image: Annotated[str, Meta(min_length=1, max_length=512)]
    session_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    environment: dict[_Name, _Value] = {}
    """Variables of the server's process and, in our own images, of the commands, too; where runtimes are processes
    of the commands alone."""
    resource_factor: int = 1
    """1, 2, 4 or 8: how many times `unit_cpus`, `unit_memory` and `unit_disk` it has."""
    runtime_class: str | None = None
    """A name in `runtime_classes`; None: the engine's default. One that isolates is refused where runtimes are
    processes."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    command: Annotated[str, _TEXT] | Annotated[list[Annotated[str, _TEXT]], Meta(max_length=256)] | None = (
        None
    )
    """What is run instead of what the image says; a text is split as a shell does it. Any server will do: it is reached
    at the port that follows `--port`, else at 8000, is ready when `GET /health` answers, and finds its key in
    `AGENT_SERVER_API_KEY`, `SESSION_API_KEY` and `OH_SESSION_API_KEYS_0`."""
    working_dir: Annotated[str, Meta(pattern=r"^/[^\0]*$", max_length=4096)] | None = None
    """The folder of that command."""
    run_as_user: _User | None = None
    """The user of that command; in our own images, without a command, the one of the commands."""
    fs_group: _User | None = None
    """A further group of that command: `/data` belongs to it with all that is made in it later, and it may write there.
    In our own images the data is the server's alone."""


class Record(Wanted, frozen=True, kw_only=True):
    """What is kept of a runtime, on the disk before anything is started."""

    runtime_id: str
    tenant: str
    api_key: str
    """What its clients need."""
    cpus: float
    memory: int
    disk: int | None = None
    """Bytes that its data may take, where that can be limited; None: no limit."""
    created: float
    """Seconds since the Unix epoch."""
    wanted: Literal["running", "paused", "gone"] = "running"
    restarts: int = 0
    reasons: tuple[str, ...] = ()
    """Why it was started again, the latest last."""

    def __repr__(self) -> str:
        return f"Record({self.runtime_id}, {self.wanted})"


def machine_name(runtime_id: str) -> str:
    """Return the name of the machine of a runtime."""
    return f"{PREFIX}{runtime_id}"


def machine_of(
    record: Record, *, labels: Mapping[str, str], network: str | None, runtime: str | None
) -> Machine:
    """Return the machine of a runtime.

    Args:
        record: what was asked for.
        labels: whose it is.
        network: which it is in; None: the backend's default.
        runtime: the backend's word for the class that was asked for.
    """
    words = record.command if isinstance(record.command, list) else shlex.split(record.command or "")
    ours = not words or words[0] == OUR_START
    env = dict(record.environment)
    # In our own image the server keeps its user, and it is commands that run as another one.
    if ours and record.environment:
        env |= packed(record.environment)
    if ours and record.run_as_user is not None:
        env["AGENT_SERVER_BOX_USER"] = str(record.run_as_user)
    return Machine(
        name=machine_name(record.runtime_id),
        labels=labels,
        image=record.image,
        pull=PULL[record.image_pull_policy],
        env=env,
        secret_env=dict.fromkeys(KEY_NAMES, record.api_key),
        command=tuple(words) or None,
        working_dir=record.working_dir,
        user=None if ours else record.run_as_user,
        group=None if ours else record.fs_group,
        ports=(_port(words),),
        storage=Storage(DATA, record.disk),
        network=network,
        memory=record.memory,
        cpus=None if record.cpus is None else min(max(record.cpus, LEAST_CPUS), MOST_CPUS),
        runtime=runtime,
    )


def _port(command: Sequence[str]) -> int:
    """Where the server that this command starts listens: what follows `--port`, as all of them call it."""
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name == "--port":
            port = whole(value or next(iter(command[at + 1 :]), ""))
            if port is not None and 0 < port <= 65535:
                return port
    return SERVER_PORT
