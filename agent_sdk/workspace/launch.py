"""Starting a program: which one, in which folder, and the sentence for why it did not start."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agent_sdk.protocol.errors import (
    AgentServerError,
    InvalidParams,
    LimitExceeded,
    NotADirectory,
    PathDenied,
    PathError,
    PathNotFound,
    PolicyDenied,
)
from agent_sdk.workspace.disk import Folder, path_error
from agent_sdk.workspace.environment import MARKER
from agent_sdk.workspace.paths import Root
from agent_sdk.workspace.users import User

NOT_FOUND, NOT_EXECUTABLE = 127, 126

# A session leader's terminal is the first one it opens: no code of ours has to run between fork and exec.
# When the leader ends, the terminal hangs up on whatever runs in the foreground: also on filters that the program
# wrote through. So the leader is a shell that stays: it begins when told to, tells the end of the program, waits until
# it is let go, and ends as the program did. A signal that both got, as one process group, ends both; one that the
# program alone got makes an exit code. Before the copy of the shell that becomes the program has told that it is there,
# a signal would reach the leader alone, which outlives it.
_ON_TERMINAL = rb"""
read -r name || exit
: <"$0"
got=
for name in HUP INT QUIT USR1 USR2 ALRM TERM PIPE VTALRM PROF XCPU XFSZ; do trap "got=\"\$got $name \"" $name; done
(echo begun; exec "$@" <"$0" >"$0" 2>&1)
code=$?
trap '' HUP INT QUIT USR1 USR2 ALRM TERM PIPE VTALRM PROF XCPU XFSZ
echo ended
read -r name
[ $code -le 128 ] || name=$(kill -l $code)
case $got in *" ${name:--} "*) trap - $name; kill -s $name $$;; esac
exit $code
"""

_MENDED_BY_POPEN = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
"""As the kernel writes them."""


class SpawnFailed(Exception):
    """The program did not start. Nothing is left of it."""

    def __init__(self, error: AgentServerError, code: str, exit_code: int | None = None) -> None:
        """Takes the error that callers who want an exception get, the errno's name and the shell's exit code."""
        super().__init__(error.message)
        self.error = error
        self.reason = f"{code}: {error.message}"
        self.exit_code = exit_code


@dataclass(frozen=True)
class Launch:
    """Everything about a program that is about to start."""

    argv: Sequence[bytes]
    environment: Mapping[str, str]
    executable: str | None = None
    """None: the first argument, looked up in PATH."""
    terminal: str | None = None
    """Path of the terminal that becomes its controlling terminal and its standard streams."""
    pass_fds: Sequence[int] = ()
    user: User | None = None
    """None: as this process."""


def open_folder(root: Root, cwd: str) -> Folder:
    """Open the folder a command starts in. Blocks for a few system calls.

    Args:
        root: which it may not leave.
        cwd: relative to the home, or absolute.

    Raises:
        InvalidParams, OutsideWorkspace: the path is not acceptable.
        SpawnFailed: there is no such folder, or it cannot be entered.
    """
    try:
        with root.entry(cwd, field="cwd") as entry:
            return Folder(entry.open(os.O_PATH | os.O_DIRECTORY), root.absolute(entry.names))
    except (InvalidParams, PolicyDenied):
        raise
    except PathNotFound:
        raise SpawnFailed(PathNotFound(f"No such file or directory: {cwd}", path=cwd), "ENOENT") from None
    except NotADirectory:
        raise SpawnFailed(NotADirectory(f"Not a directory: {cwd}", path=cwd), "ENOTDIR") from None
    except PathError as exc:
        raise SpawnFailed(exc, str(exc.details.get("errno", "EIO"))) from None


@dataclass(frozen=True)
class Interpreter:
    """A shell as a program: what runs text."""

    path: str
    """Absolute."""
    options: tuple[bytes, ...] = ()
    """Before all arguments: of a loader that starts it."""
    is_bash: bool = False

    def launch(
        self,
        arguments: Sequence[bytes],
        environment: Mapping[str, str],
        terminal: str | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Launch:
        """Return how a command is started with these arguments."""
        argv = (os.fsencode(os.path.basename(self.path)), *self.options, *arguments)
        return Launch(argv, environment, self.path, terminal, pass_fds)


def find_bash(environment: Mapping[str, str], spare: Sequence[str] = ()) -> Interpreter:
    """Return bash, or the spare one (the words that start it), or sh where there is none."""
    if found := _find(b"bash", environment):
        return Interpreter(found, is_bash=True)
    return _spare(spare) or find_sh(environment)


def find_sh(environment: Mapping[str, str], spare: Sequence[str] = ()) -> Interpreter:
    """Return any shell, the smallest first."""
    found = _find(b"sh", environment) or _find(b"bash", environment)
    return Interpreter(found) if found else _spare(spare) or Interpreter("/bin/sh")


def _spare(words: Sequence[str]) -> Interpreter | None:
    return Interpreter(words[0], tuple(map(os.fsencode, words[1:])), is_bash=True) if words else None


def _find(name: bytes, environment: Mapping[str, str]) -> str | None:
    runnable = (place for place in _places(name, environment) if _is_program(place))
    return next(map(os.fsdecode, runnable), None)


def _places(name: bytes, environment: Mapping[str, str]) -> Iterator[bytes]:
    path = os.fsencode(environment.get("PATH", os.defpath))
    return (os.path.join(part or b".", name) for part in path.split(b":"))


def _is_program(place: bytes) -> bool:
    return os.path.isfile(place) and os.access(place, os.X_OK)


def spawn(
    launch: Launch, folder: Folder, operation: str, sh: Interpreter, *, stdin: int, stdout: int, stderr: int
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, with a terminal as a child of `sh`; returns when it runs.

    With a terminal, `stdin` and `stdout` are those of `sh`, which starts the program when it reads a line, writes
    `begun` when that is there and `ended` when it has ended, and ends at the end of its input.

    Raises:
        SpawnFailed: it does not.
    """
    environment = {os.fsencode(name): os.fsencode(value) for name, value in launch.environment.items()}
    environment[MARKER.encode()] = operation.encode()
    environment[b"PWD"] = os.fsencode(folder.path)
    argv, executable, user = list(launch.argv), launch.executable, launch.user
    if launch.terminal is not None:
        program = executable or _find_program(argv[0], launch.environment, folder)
        opens = (b"-c", _ON_TERMINAL, os.fsencode(launch.terminal), os.fsencode(program))
        argv, executable = [b"sh", *sh.options, *opens, *argv[1:]], sh.path
        if user is not None:  # it opens the terminal as who it is
            os.chmod(launch.terminal, 0o666)
    # Through the descriptor the child enters the very folder that was checked.
    cwd = f"/proc/self/fd/{folder.fd}"
    try:
        return subprocess.Popen(
            argv,
            executable=executable,
            cwd=cwd,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            pass_fds=launch.pass_fds,
            user=None if user is None else user.uid,
            group=None if user is None else user.gid,
            extra_groups=None if user is None else user.groups,
            preexec_fn=with_default_signals(),
        )
    except OSError as exc:
        if exc.filename == cwd:
            raise _folder_failed(exc, folder) from None
        raise _program_failed(exc, os.fsdecode(launch.argv[0])) from None


def with_default_signals() -> Callable[[], None] | None:
    """Return what a new process has to do to begin with default signals; None where it does so anyway.

    A program that is started in the background of a script ignores ^C, and all that it starts would, too.
    Popen mends what Python itself ignores. The function runs between fork and exec, hence only where it must.
    """
    ignored = _ignored()
    if not ignored and not signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return None

    def begin() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return begin


def _ignored() -> list[int]:
    """Return the signals that this process ignores, but for those that Popen mends.

    The kernel tells five times as fast as Python does.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            mask = int(status.read().partition(b"\nSigIgn:")[2][:18], 16)
    except (OSError, ValueError):  # not every kernel tells
        mask = sum(1 << n - 1 for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN)
    mask &= ~_MENDED_BY_POPEN
    # make lets its children ignore 32, which is the C library's own: nobody can ask for it to be changed.
    return [number for number in signal.valid_signals() if mask >> (number - 1) & 1] if mask else []


def _folder_failed(exc: OSError, folder: Folder) -> SpawnFailed:
    code = errno.errorcode.get(exc.errno or 0, "EIO")
    if exc.errno == errno.ENOENT:
        return SpawnFailed(PathNotFound(f"No such file or directory: {folder.path}", path=folder.path), code)
    return SpawnFailed(path_error(exc, folder.path), code)


def _program_failed(exc: OSError, name: str) -> SpawnFailed:
    code = errno.errorcode.get(exc.errno or 0, "EIO")
    words = os.strerror(exc.errno or errno.EIO)
    match exc.errno:
        case errno.ENOENT if "/" in name and os.path.exists(name):
            message = f"{words}: the interpreter that {name} names"
            return SpawnFailed(PathNotFound(message, path=name), code, NOT_FOUND)
        case errno.ENOENT | errno.ENOTDIR:
            return SpawnFailed(PathNotFound(f"{words}: {name}", path=name), code, NOT_FOUND)
        case errno.EACCES | errno.EPERM:
            return SpawnFailed(
                PathDenied(f"{words}: {name} cannot be executed", path=name), code, NOT_EXECUTABLE
            )
        case errno.E2BIG:
            message = f"{words}: the arguments together with the environment"
            return SpawnFailed(LimitExceeded(message, field="argv"), code, NOT_EXECUTABLE)
        case errno.EAGAIN | errno.ENOMEM:
            message = f"{words}: no more processes can be started here; end some first"
            return SpawnFailed(LimitExceeded(message, field="argv"), code, NOT_EXECUTABLE)
    error = PathError(f"{words}: {name}", path=name, errno=code)
    return SpawnFailed(error, code, NOT_EXECUTABLE)


def _find_program(name: bytes, environment: Mapping[str, str], folder: Folder) -> bytes:
    """Return what exec would find; with a terminal a small shell calls exec, and cannot tell us why it failed."""
    here = (os.path.join(os.fsencode(folder.path), name),)
    problem: OSError = FileNotFoundError(errno.ENOENT, "not found")
    for place in here if b"/" in name else _places(name, environment):
        if _is_program(place):
            return name if b"/" in name else place
        if os.path.exists(place):
            problem = PermissionError(errno.EACCES, "not executable")
    raise _program_failed(problem, os.fsdecode(name))
