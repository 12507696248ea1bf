"""What a command finds in its environment; the one place here that reads the caller's.

Programs that would wait for a person (pagers, editors, password prompts) are told not to. What is
meant for the server itself never reaches a command.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import msgspec

MARKER = "AGENT_SERVER_OP"
"""Names the operation a process belongs to, so that all of its processes can be found again."""

COMMAND_ENV = "AGENT_SERVER_COMMAND_ENV"
"""Holds variables for commands, as a JSON object; commands see those, and not this one."""

_SECRET = ("LLM_API_KEY",)
_RESERVED_PREFIX = "AGENT_SERVER_"
# A caller that was itself started by a git hook would send every git command into its own repository.
_GIT_PLACES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_PREFIX",
)
_DROPPED = frozenset((*_SECRET, *_GIT_PLACES, "OLDPWD", "BASH_ENV", "ENV", "PROMPT_COMMAND"))

_NOBODY_WATCHES = {
    "PAGER": "cat",
    "MANPAGER": "cat",
    "SYSTEMD_PAGER": "cat",
    "GIT_PAGER": "cat",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "true",
    "GIT_SEQUENCE_EDITOR": "true",
    "EDITOR": "true",
    "VISUAL": "true",
    "DEBIAN_FRONTEND": "noninteractive",
    "PIP_NO_INPUT": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def temporary_folder() -> str:
    """Return the folder for what need not last."""
    return os.path.abspath(os.environ.get("TMPDIR") or "/tmp")


def from_caller(names: Iterable[str]) -> dict[str, str]:
    """Return those of the caller's variables that have these names; what is not set is left out."""
    return {name: os.environ[name] for name in names if name in os.environ}


def packed(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment by which a box learns of variables that are for its commands alone."""
    return {COMMAND_ENV: msgspec.json.encode(dict(variables)).decode()}


def unpacked() -> dict[str, str]:
    """Return what `packed` left in the environment of this process; nothing where nobody did."""
    return msgspec.json.decode(os.environ.get(COMMAND_ENV, "{}"), type=dict[str, str])


def workspace_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the caller's environment without secrets and prompts, with `extra` on top."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _DROPPED and not name.startswith(_RESERVED_PREFIX)
    }
    environment.setdefault("PATH", _DEFAULT_PATH)
    environment.update(_NOBODY_WATCHES)
    environment.update(extra or {})
    return environment
