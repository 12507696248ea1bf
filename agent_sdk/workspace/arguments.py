"""What may be asked for: limits on commands, environments and clocks, and the sentences that refuse the rest."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence

from agent_sdk.protocol.errors import InvalidParams, PolicyDenied

ARGUMENT_BYTES = 131_071
"""Linux takes 128 KiB per argument, its closing NUL included."""
ARGUMENTS = 4096
VARIABLES = 1024
SHORTEST_SECONDS, LONGEST_SECONDS = 0.001, 86_400.0


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
    if not isinstance(command, list | tuple):
        raise InvalidParams(f"command: expected text or a list of texts, got {type(command).__name__}")
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


def check_seconds(value: float | None, field: str) -> float | None:
    """Return a duration in seconds within 0.001..86400, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParams(f"{field}: expected seconds, got {type(value).__name__}")
    if not SHORTEST_SECONDS <= value <= LONGEST_SECONDS:
        raise InvalidParams(f"{field}: {SHORTEST_SECONDS}..{LONGEST_SECONDS:.0f} seconds (got {value})")
    return float(value)


def check_size(rows: int, cols: int) -> tuple[int, int]:
    """Return the size of a terminal, 1..65535 each."""
    for field, value in (("rows", rows), ("cols", cols)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
            raise InvalidParams(f"{field}: 1..65535 (got {value!r:.40})")
    return rows, cols


def check_signal(name: str) -> signal.Signals:
    """Return the signal of this name, with or without SIG."""
    full = name if name.startswith("SIG") else f"SIG{name}"
    known = signal.Signals.__members__.get(full)
    if known is None:
        raise InvalidParams(f"name: no such signal: {name!r:.40}")
    return known


def check_clocks(timeout: float | None, yield_after: float | None) -> tuple[float | None, float | None]:
    """Check the times of a command, in seconds."""
    timeout = check_seconds(timeout, "timeout")
    yield_after = check_seconds(yield_after, "yield_after")
    if timeout is not None and yield_after is not None and yield_after > timeout:
        raise InvalidParams(f"yield_after: {yield_after} s is after the timeout of {timeout} s")
    return timeout, yield_after
