"""What a command is given, its arguments and its environment; the one place here that reads the caller's.

Programs that would wait for a person (pagers, editors, password prompts) are told not to. What is
meant for the server itself never reaches a command.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from agent_sdk.protocol.errors import InvalidParams, PolicyDenied

ARGUMENT_BYTES = 131_071
"""Linux takes 128 KiB per argument, its closing NUL included."""
ARGUMENTS = 4096
VARIABLES = 1024

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


def encode(text: object, field: str) -> bytes:
    """Return text as the bytes the system gets: UTF-8, surrogate escapes turned back into their bytes."""
    if not isinstance(text, str):
        raise InvalidParams(f"{field}: expected text, got {type(text).__name__}")
    if "\0" in text:
        raise InvalidParams(f"{field}: contains a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidParams(f"{field}: contains a lone surrogate") from None


def check_argument(text: object, field: str) -> bytes:
    """Return one argument of a command as bytes."""
    data = encode(text, field)
    if len(data) > ARGUMENT_BYTES:
        raise InvalidParams(f"{field}: too long, at most {ARGUMENT_BYTES} bytes (got {len(data)})")
    return data


def check_command(command: str | Sequence[str]) -> bytes | list[bytes]:
    """Return shell text as bytes, or an argument list as a list of bytes."""
    if isinstance(command, str):
        return check_argument(command, "command")
    return check_argv(command)


def check_argv(command: Sequence[str]) -> list[bytes]:
    """Return an argument list as a list of bytes."""
    if not command:
        raise InvalidParams("argv: empty")
    if len(command) > ARGUMENTS:
        raise InvalidParams(f"argv: at most {ARGUMENTS} arguments (got {len(command)})")
    argv = [check_argument(argument, f"argv[{index}]") for index, argument in enumerate(command)]
    if not argv[0]:
        raise InvalidParams("argv[0]: empty")
    return argv


def check_environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """Return the variables of a call.

    Raises:
        PolicyDenied: a name starts with `AGENT_`; those are the server's own.
    """
    if env is None:
        return {}
    if len(env) > VARIABLES:
        raise InvalidParams(f"env: at most {VARIABLES} variables (got {len(env)})")
    for name, value in env.items():
        size = len(encode(name, "env: a name")) + len(encode(value, f"env[{name!r:.80}]"))
        if not name or "=" in name:
            raise InvalidParams(f"env: {name!r:.80} is no name of a variable")
        if name.startswith("AGENT_"):
            raise PolicyDenied(f"env: names starting with AGENT_ are reserved (got {name:.80})")
        if size + 1 > ARGUMENT_BYTES:
            raise InvalidParams(
                f"env[{name!r:.80}]: too long, at most {ARGUMENT_BYTES} bytes (got {size + 1})"
            )
    return dict(env)
