"""agent-server: what can be typed, from words to a command, and from what went wrong to a sentence and an exit code.

Nothing but argparse is imported before a command is used, so that `agent-server --help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import NoReturn

PROGRAM = "agent-server"

DESCRIPTION = """\
Run AI agents here, in a container or on other machines, through one protocol.
"""

EPILOG = """\
environment:
  AGENT_SERVER_URL, AGENT_SERVER_API_KEY   the server that client commands talk to, and its key; for a server
                                           of this machine with the default data folder the key is found by itself
  AGENT_SERVER_PORT, AGENT_SERVER_DATA, …  every option of the server
  LLM_MODEL, LLM_API_KEY, LLM_BASE_URL     the model that `run` uses
  NO_COLOR                                 no colours

exit codes:
  0 done   1 failed   2 wrong usage or configuration   69 the server cannot be reached   77 wrong API key
  73 the data folder cannot be written   75 the port or the data folder is in use   130 stopped with Ctrl-C
  `exec` exits as its command does: 128 + n when signal n ended it, 124 when its time was over
"""

STATES = ("idle", "running", "awaiting", "paused", "failed", "closed", "damaged")

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
        given = parse(sys.argv[1:] if words is None else words)
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
        module, name = work_of(given.command)
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


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes told in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        self.exit(2, f"{PROGRAM}: {message}; see {self.prog} --help\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command and its options.

    Raises:
        SystemExit: 2 and one sentence on stderr, or 0 after `--help` and `--version`.
    """
    words = list(arguments)
    parser = _parser()
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        close = difflib.get_close_matches(words[0], _COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; {PROGRAM} --help lists them"
        parser.exit(2, f"{PROGRAM}: there is no command {words[0][:64]!r}{hint}\n")
    # What follows `--` belongs to somebody else; how argparse treats it differs between Python's versions.
    program: list[str] = []
    if words[:1] == ["exec"] and "--" in words:
        cut = words.index("--")
        words, program = words[:cut], words[cut + 1 :]
    given = parser.parse_args(words)
    given.program = program
    return given


def work_of(command: str) -> tuple[str, str]:
    """Return the module of this package that does what a command says, and its function."""
    module, _, name = _COMMANDS[command][2].partition(".")
    return module, name


def help_text() -> str:
    """Return what `agent-server --help` prints."""
    return _parser().format_help()


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (summary, fill, _) in _COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=f"{summary}.", allow_abbrev=False)
        fill(child)
    return parser


def _serve(parser: argparse.ArgumentParser) -> None:
    _listener(parser)
    _json(parser, "print one line of JSON when ready: url, api_key_file, pid")


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="what the agent is to do")
    _workspace(parser)
    parser.add_argument("--model", help="provider/name, e.g. openai/gpt-5.5 (default: LLM_MODEL)")
    parser.add_argument("--script", metavar="FILE", help="no model: a JSON list of scripted steps")
    parser.add_argument(
        "--max-iterations", type=_positive, default=500, metavar="N", help="model calls (500)"
    )
    _json(parser, "print events as lines of JSON")


def _exec(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{PROGRAM} exec [options] (TEXT | -- PROGRAM [ARGUMENT …])"
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a command line for bash")
    _workspace(parser)
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="seconds until it is ended; exit code 124"
    )
    parser.add_argument(
        "-i", "--stdin", action="store_true", help="give it what this program reads, to its end"
    )


def _cp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a file or a folder; `:path` is a path in the workspace, `-` standard input, `folder/.` what is in it",
    )
    parser.add_argument(
        "target",
        metavar="DST",
        help="where it goes, `-`: to standard output; exactly one of both starts with `:`",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave out of a folder, e.g. .git"
    )
    _workspace(parser)


def _rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", type=_id, nargs="+", metavar="ID", help="a conversation; `ls` shows them")
    parser.add_argument("--force", action="store_true", help="also one that runs, or waits for an answer")
    _server(parser)


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--older-than", type=_duration, metavar="D", help="made before that, e.g. 30d, 12h")
    parser.add_argument("--idle", type=_duration, metavar="D", help="without an event since then")
    _server(parser)


def _ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_positive, default=1000, metavar="N", help="at most so many (1000)")
    parser.add_argument(
        "--tag", type=_tag, action="append", default=[], metavar="NAME=VALUE", help="only those with it"
    )
    parser.add_argument(
        "--state", choices=STATES, metavar="STATE", help=f"only those in it: {', '.join(STATES)}"
    )
    _server(parser)
    _json(parser, "print conversations as lines of JSON")


def _events(parser: argparse.ArgumentParser) -> None:
    _attach(parser)
    parser.add_argument("--follow", action="store_true", help="go on with new events until Ctrl-C")
    _json(parser, "print events as lines of JSON")


def _attach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=_id, metavar="ID", help="a conversation; `agent-server ls` shows them")
    parser.add_argument("--since", type=_count, default=0, metavar="N", help="only events after this seq")
    _server(parser)


def _health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", help="the server (default: AGENT_SERVER_URL, or the one that runs with the data folder)"
    )
    _data(parser)


def _backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DEST", help="a folder that does not exist yet")
    _data(parser)


def _config(parser: argparse.ArgumentParser) -> None:
    _listener(parser)
    _json(parser, "print one JSON object per line")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str]] = {
    "serve": ("run the server", _serve, "server.serve"),
    "run": (
        "run one conversation to its end; exit code 0 only when the agent finished",
        _run,
        "conversations.run",
    ),
    "exec": ("run a command in a workspace; its exit code is ours", _exec, "workspace.execute"),
    "cp": ("copy a file or a folder into or out of a workspace", _cp, "workspace.copy"),
    "ls": ("list the conversations of a server", _ls, "conversations.list_them"),
    "rm": ("remove conversations with their logs and workspaces", _rm, "conversations.remove"),
    "prune": ("remove the conversations that nobody has used for long", _prune, "conversations.prune"),
    "events": ("show the events of a conversation", _events, "conversations.show"),
    "attach": (
        "watch a conversation and talk to it; Ctrl-C leaves, the agent goes on",
        _attach,
        "conversations.attach",
    ),
    "doctor": ("say what works on this machine, and how to mend what does not", _config, "doctor.doctor"),
    "health": ("ask whether a server answers; exit code 0 when it does", _health, "server.health"),
    "config": (
        "show every option of the server, its value and where it was set",
        _config,
        "server.show_options",
    ),
    "backup": ("copy the data folder of a server, also while it works", _backup, "server.back_up"),
}

"""By name: what it is for, what fills in its options, and the function that does it."""


def _workspace(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument(
        "--workspace",
        metavar="DIR|URL|docker:IMAGE",
        help="a folder of this machine (default: this one), a server's URL: a fresh workspace there, or "
        "docker:IMAGE: a server in a container that is removed afterwards (docker: takes agent-server:latest)",
    )
    group.add_argument(
        "--conversation", type=_id, metavar="ID", help="the workspace of this conversation of a server"
    )
    group.add_argument(
        "--working-dir", metavar="DIR", help="with a URL or docker:IMAGE: an existing folder there"
    )
    _server(parser)


def _server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--url", help="the server (default: AGENT_SERVER_URL, or http://127.0.0.1:8000)")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="its key (default: AGENT_SERVER_API_KEY, which the process list does not show)",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a file that holds its key")


def _listener(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000); 0 takes a free one")
    _data(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="folder of everything that lasts: key, log, workspaces")
    parser.add_argument("--config", metavar="FILE", help="TOML file with any option of the server")


def _json(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--json", action="store_true", help=text)


def _id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text) or text == "new":
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is no id of a conversation")
    return text


def _tag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is no tag; write NAME=VALUE")
    return name, value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number between 1 and 1000000")
    return int(text)


def _duration(text: str) -> float:
    from agent_server.config.sources import duration

    seconds = duration(text)
    if seconds is None:
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is no duration; write a number and s, m, h, d or w")
    return seconds


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.001 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds between 0.001 and 86400")
    return value
