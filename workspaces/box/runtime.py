"""The box runtime: all that a box needs to run in an image that has nothing, not even a libc.

It is a folder made once from the interpreter that runs this: the interpreter with its own loader and
libraries, what a box imports of the standard library and of this product (compiled, without sources), and
bash where this machine has one. It is mounted read-only at `/opt/agent` of every container. A program in it
is started through its loader, so nothing of the image takes part, and commands inherit nothing of it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import platform
import py_compile
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

import agent_sdk
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import WorkspaceUnavailable
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.contract import RUNTIME

MOUNT = RUNTIME
"""Where it is in every container."""

BROUGHT = Path(sys.prefix, "share", "agent-box")
"""Where the runtime of an installation is that has one."""

_FORMAT = "2"
_PRELOAD = b"/etc/ld.so.preload", f"{MOUNT}/preload".encode()
"""What a loader loads into every program. In an image that is the image's, so ours looks where
nothing is: in a place with a name of the same length."""
_NOT_OF_THE_LIBRARY = frozenset(
    {"__pycache__", "_pyrepl", "config", "curses", "dbm", "dist-packages", "distutils", "email", "ensurepip"}
    | {"html", "http", "idlelib", "lib-dynload", "lib2to3", "multiprocessing", "pydoc_data", "site-packages"}
    | {"sqlite3", "test", "tkinter", "turtledemo", "unittest", "venv", "wsgiref", "xml", "xmlrpc"}
)
_NOT_OF_THE_PRODUCT = frozenset({"__pycache__", "agent", "conversation", "log", "remote"})
_NOT_OF_THE_EXTENSIONS = ("_codecs_", "_ctypes_test", "_test", "_xx", "xx")
_SYSTEM = ("libc.", "libm.", "libdl.", "librt.", "libutil.", "libpthread.", "libpython", "libz.")
_EXTENSIONS_NEED = (*_SYSTEM, "libffi.", "libcrypto.")
"""Which libraries a module of the interpreter may need; a box can do without those that need others."""


@dataclass(frozen=True)
class BoxRuntime:
    """A finished runtime. Nothing in it changes any more."""

    path: Path
    """On this machine; to be mounted read-only at `MOUNT`."""

    def python(self, place: str) -> list[str]:
        """How its interpreter is started where the runtime is at `place`."""
        return [*_through_loader(place, "python3"), "-I", "-S", "-X", "utf8"]

    @property
    def entrypoint(self) -> list[str]:
        """How a container starts a box; the options of `agent_sdk.box` follow."""
        command = [*self.python(MOUNT), "-m", "agent_sdk.box", "--unclaimed"]
        if (self.path / "bin/bash").exists():
            named = ["--argv0", "bash"] if (self.path / "lib/argv0").exists() else []
            command += ["--spare-bash", shlex.join(_through_loader(MOUNT, "bash", *named))]
        return command

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())


async def box_runtime(folder: Path, *, in_place: bool = False) -> BoxRuntime:
    """Return the runtime of this version from `folder`; made there first when it is missing (2 to 5 s).

    An image of the server brings one along, which is copied then.

    Args:
        folder: where those of all versions are.
        in_place: return the one that was brought along where it is. No container can mount that.

    Any number of processes may do that at once. One of another version stays: a container may still use it.
    Cancelling waits for the end.

    Raises:
        WorkspaceUnavailable: it cannot be made; with phase and cause.
    """
    try:
        return await in_thread(_find_or_make, folder, in_place)
    except (OSError, py_compile.PyCompileError) as exc:
        raise WorkspaceUnavailable(
            f"the box runtime cannot be made in {folder}: {exc}; "
            "sandboxes need a CPython for Linux with glibc, and 60 MB of disk",
            phase="runtime",
        ) from None


def _through_loader(root: str, program: str, *options: str) -> list[str]:
    # The cache of the image's libraries would lead to libraries of the image.
    loader = [f"{root}/lib/ld.so", "--inhibit-cache", "--library-path", f"{root}/lib", *options]
    return [*loader, f"{root}/bin/{program}"]


def _find_or_make(folder: Path, in_place: bool) -> BoxRuntime:
    folder, name = folder.absolute(), _digest()
    finished, brought = folder / name, BROUGHT / name
    if in_place and brought.exists():
        return BoxRuntime(brought)
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            for left_behind in folder.glob("new-*"):
                shutil.rmtree(left_behind, ignore_errors=True)
            if not finished.exists():
                new = folder / f"new-{new_id()}"
                (shutil.copytree(brought, new) if brought.exists() else _make(new)).rename(finished)
    return BoxRuntime(finished)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else makes one there meanwhile. Blocks."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest() -> str:
    """Name what the runtime is made from."""
    parts = [_FORMAT, sys.version, platform.machine(), msgspec.__version__]
    for program in (_python(), _bash()):
        if program is not None:
            state = program.stat()
            parts.append(f"{program} {state.st_size} {state.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in _sources(Path(agent_sdk.__file__).parent, _NOT_OF_THE_PRODUCT):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _make(new: Path) -> Path:
    """Make all of it at `new`, and see that it starts."""
    libraries = new / "lib"
    modules = libraries / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in (new, new / "bin", libraries, modules, modules / "lib-dynload"):
        folder.mkdir()
    loader = _loader()
    programs = {new / "bin/python3": _python(), new / "bin/bash": _bash()}
    _compile(Path(os.__file__).parent, modules, _NOT_OF_THE_LIBRARY)
    _compile(Path(agent_sdk.__file__).parent, modules / "agent_sdk", _NOT_OF_THE_PRODUCT)
    _compile(Path(msgspec.__file__).parent, modules / "msgspec", frozenset({"__pycache__"}))
    programs |= {modules / "msgspec" / file.name: file for file in Path(msgspec.__file__).parent.glob("*.so")}
    for target, program in programs.items():
        if program is not None:
            _copy(program, target, _needed(loader, program), libraries)
    for module in sorted((Path(os.__file__).parent / "lib-dynload").glob("*.so")):
        if module.name.startswith(_NOT_OF_THE_EXTENSIONS):
            continue
        needed = _needed(loader, module)
        if all(library.name.startswith(_EXTENSIONS_NEED) for library in needed):
            _copy(module, modules / "lib-dynload" / module.name, needed, libraries)
    _strip(new)
    (libraries / "ld.so").write_bytes(loader.read_bytes().replace(*_PRELOAD))
    if "--argv0" in _output(str(loader), "--help"):  # glibc 2.33
        (libraries / "argv0").touch()
    for path in (new, *new.rglob("*")):
        path.chmod(0o755)
    _output(
        *_through_loader(str(new), "python3"),
        "-I",
        "-S",
        "-c",
        "import agent_sdk.box.process, ctypes, hashlib",
    )
    return new


def _python() -> Path:
    return Path("/proc/self/exe").resolve()


def _bash() -> Path | None:
    return next(
        (path.resolve() for path in (Path("/bin/bash"), Path("/usr/bin/bash")) if path.exists()), None
    )


def _loader() -> Path:
    """The dynamic loader that is loaded in this very process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line[line.rfind("/") + 1 :]
        if "/" in line and name.startswith(("ld-", "ld.so")):
            return Path(line[line.index("/") :])
    raise OSError("this interpreter has no dynamic loader")


def _needed(loader: Path, program: Path) -> list[Path]:
    """Which libraries a program or module loads, by the loader's own account."""
    lines = _output(str(loader), "--list", str(program)).splitlines()
    found = [line.partition(" => ")[2].rpartition(" (")[0] or "not found" for line in lines if " => " in line]
    return [Path(path) for path in found if Path(path).name != loader.name]


def _copy(source: Path, target: Path, needed: Iterable[Path] = (), libraries: Path = Path()) -> None:
    shutil.copyfile(source, target)
    for library in needed:
        if not (libraries / library.name).exists():
            shutil.copyfile(library, libraries / library.name)


def _compile(source: Path, target: Path, without: frozenset[str]) -> None:
    for file in _sources(source, without):
        name = file.relative_to(source)
        py_compile.compile(
            str(file),
            cfile=str((target / name).with_suffix(".pyc")),
            dfile=f"{target.name}/{name}",  # tracebacks tell no path of this machine
            doraise=True,
            optimize=2,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def _sources(folder: Path, without: frozenset[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.partition("-")[0] not in without and path.name not in without:
            yield from _sources(path, frozenset({"__pycache__", "test", "tests"}))
        elif path.suffix == ".py":
            yield path


def _strip(new: Path) -> None:
    """Leave out what only debuggers read, where this machine can."""
    if shutil.which("strip"):
        binaries = [str(path) for path in (*new.rglob("*.so*"), *(new / "bin").iterdir())]
        subprocess.run(["strip", "--strip-unneeded", *binaries], capture_output=True, check=False)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=False, text=True, cwd="/")
    if done.returncode:
        raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


if __name__ == "__main__":
    made = asyncio.run(box_runtime(Path(sys.argv[1])))
    sys.stdout.write(f"{made.path}: {made.size / (1 << 20):.1f} MiB\n")
