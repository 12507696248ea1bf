"""agent-server: from words to a command, and from what went wrong to one sentence and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from agent_server.cli import arguments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable

FAILED = 1
WRONG_USAGE = 2
UNREACHABLE = 69
NOT_AUTHORISED = 77
SIGNALLED = 128
"""Plus the signal's number: how shells tell that a program was ended by one."""

# What follows is imported when a command is used: `--help` does without.
# ruff: noqa: PLC0415


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        _open_closed()
        given = arguments.parse(sys.argv[1:] if words is None else words)
        if given.command is None and not given.version:
            sys.stderr.write("agent-server: a command is missing; agent-server --help lists them\n")
            return WRONG_USAGE
        return _perform(given)
    except KeyboardInterrupt:
        return SIGNALLED + 2


def _version() -> int:
    from agent_sdk import __version__

    sys.stdout.write(f"agent-server {__version__}\n")
    sys.stdout.flush()
    return 0


def _open_closed() -> None:
    """Let standard streams that the caller has closed lead nowhere: what is opened next would take their place."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _perform(given: argparse.Namespace) -> int:
    try:
        if given.version:
            return _version()
        module, name = arguments.work_of(given.command)
        return _until_stopped(getattr(import_module(f"agent_server.cli.{module}"), name), given)
    except Exception as exc:  # the boundary of the process: people get a sentence, not a traceback
        if given.traceback:
            raise
        sentence, code = explain(exc)
        if sentence:
            sys.stderr.write(f"agent-server: {sentence}\n")
        return code


def _until_stopped(work: Callable[[argparse.Namespace], Awaitable[int]], given: argparse.Namespace) -> int:
    """Run a command. TERM and HUP end it as Ctrl-C does: by cancelling, so that everything it started ends, too."""
    import asyncio
    import signal

    stopped: list[int] = []

    async def perform() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            stopped.append(number)
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, stop, number)
        return await work(given)

    try:
        return asyncio.run(perform())
    except asyncio.CancelledError:
        return SIGNALLED + (stopped[0] if stopped else signal.SIGINT)


def explain(exc: Exception) -> tuple[str, int]:
    """Return the sentence to say, if any, and the exit code."""
    from agent_sdk.protocol import errors
    from agent_server.cli.terminal import one_line
    from agent_server.config.sources import StartRefused

    while isinstance(exc, ExceptionGroup):
        exc = exc.exceptions[0]
    match exc:
        case StartRefused():
            return one_line(str(exc)), exc.exit_code
        case BrokenPipeError() if not isinstance(exc, errors.AgentServerError):
            _silence()
            return "", SIGNALLED + 13
        case errors.Unauthorized():
            reason = one_line(str(exc)).partition(";")[0]
            mend = "pass the server's key with --api-key-file, --api-key or AGENT_SERVER_API_KEY"
            return f"{reason}; {mend}", NOT_AUTHORISED
        case errors.InvalidParams():
            return one_line(str(exc)), WRONG_USAGE
        case errors.ConnectionLost() | errors.Overloaded() | errors.WorkspaceUnavailable():
            return one_line(str(exc)), UNREACHABLE
        case errors.ConversationNotFound():
            return f"{one_line(str(exc))}; agent-server ls shows those there are", FAILED
        case errors.AgentServerError():
            return one_line(str(exc)), FAILED
        case OSError():
            name = f"{exc.filename}: " if exc.filename else ""
            return one_line(f"{name}{exc.strerror or exc}"), FAILED
        case _:
            what = one_line(f"{type(exc).__name__}: {exc}")
            return f"unexpected {what}; this is a bug, agent-server --traceback … shows where", FAILED


def _silence() -> None:
    """Nobody reads our output: let what is buffered go nowhere instead of complaining at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
