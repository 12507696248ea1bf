"""What a runtime of the Runtime API runs in: the machine of its server, whatever backend makes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from agent_sdk.workspace.environment import packed
from agent_server.runtime_api.runtime import Record
from workspaces.backend.contract import KEY_NAME, SERVER_PORT, Machine, Pull, Storage

PREFIX = "agent-server-"
"""Begins the name of the machine of a runtime."""
OUR_START = "/opt/agent-server/bin/start"
"""How the command of our own image begins."""
KEY_NAMES = (KEY_NAME, "SESSION_API_KEY", "OH_SESSION_API_KEYS_0")
"""Where servers look for their key, ours and others."""
DATA = "/data"
"""Where the server in the image keeps what lasts."""
PULL: Mapping[str, Pull] = {"IfNotPresent": "missing", "Always": "always", "Never": "never"}


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
        cpus=record.cpus,
        runtime=runtime,
    )


def _port(command: Sequence[str]) -> int:
    """Where the server that this command starts listens: what follows `--port`, as all of them call it."""
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name == "--port":
            value = value or next(iter(command[at + 1 :]), "")
            if value.isdecimal() and 0 < int(value) <= 65535:
                return int(value)
    return SERVER_PORT
