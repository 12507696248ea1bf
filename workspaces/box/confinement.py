"""How a box on this machine is kept apart from whoever starts it: not at all, as another user, or by bubblewrap.

`user`: it runs as a user of its own, without capabilities; that user can go through the server's data folder to
its workspace, and see nothing else of it. `bwrap`: besides, where the server may change users, it has
namespaces of its own: no network, no other processes, the system read-only, and its workspace.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from agent_sdk.protocol.errors import IsolationUnavailable, PathDenied
from agent_sdk.workspace.disk import in_thread
from agent_sdk.workspace.users import fsuid
from workspaces.backend.sandbox_files import remove_as
from workspaces.box.machine import with_user
from workspaces.box.runtime import MOUNT, BoxRuntime, box_runtime

Isolation = Literal["none", "user", "bwrap"]

NEEDED = {"CHOWN": 0, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8}
"""What it takes to run and end boxes as another user: capabilities and their numbers."""
ETC = (
    *("alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "gitconfig"),
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "mime.types", "nsswitch.conf"),
    *("profile", "profile.d", "python3", "ssl", "terminfo", "timezone"),
)
"""What programs need of /etc. The rest may hold what is the server's."""
OWN_ETC = ("passwd", "group", "hosts")
HOSTNAME = "sandbox"
HOSTS = f"127.0.0.1 localhost {HOSTNAME}\n::1 localhost\n"
TMPFS_BYTES = 256 << 20
SHM_BYTES = 64 << 20
PROBE = "from agent_sdk.box.seccomp import install_filter; install_filter()"
PROBE_SECONDS = 20.0
UMASK = 0o022
_WORDS = 500


class Confinement(Struct, frozen=True):
    """How a box on this machine is kept apart from whoever starts it."""

    isolation: Isolation = "none"
    user: int | None = None
    """Of the boxes; its group has the same number. None: the server's."""
    runtime: Path | None = None
    """The box runtime: another user need not be able to read how this server is installed."""
    hidden: Path | None = None
    """The folder of the server, of which a box in bwrap sees nothing but what is its own."""
    etc: Path | None = None
    """The folder of the files that a box in bwrap sees in /etc in the place of the machine's."""
    umask: int = UMASK
    """Of the boxes, whatever the server's is; -1: that of whoever starts them."""

    def command(self, options: list[str], writable: Iterable[Path] = ()) -> list[str]:
        """Return the command line of a box.

        Args:
            options: those of `agent_sdk.box`.
            writable: the folders that are its own.
        """
        if self.runtime is None:
            return [sys.executable, "-m", "agent_sdk.box", *options]
        return self._python(["-m", "agent_sdk.box", *options, "--seccomp"], writable)

    def environment(self, given: Mapping[str, str], working_dir: Path) -> dict[str, str]:
        """Return what a box knows of the environment: names and folders of the server's user are not its own."""
        if self.isolation == "none":
            return dict(given)
        kept = {name: value for name, value in given.items() if name not in ("TMPDIR", "SHELL")}
        name, home = "agent", str(working_dir)
        if self.user is not None:
            with suppress(KeyError):
                entry = pwd.getpwuid(self.user)
                name, home = entry.pw_name, home if self.isolation == "bwrap" else entry.pw_dir
        # Git takes its address from there as long as nobody has configured one.
        return {**kept, "HOME": home, "USER": name, "LOGNAME": name, "EMAIL": f"{name}@localhost"}

    def give(self, folder: Path) -> None:
        """Make a folder that belongs to the boxes; fine when it is there. Blocks.

        Raises:
            OSError: it cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.user is not None and folder.stat().st_uid != self.user:
            with _named(folder) as descriptor:
                os.chown(descriptor, self.user, self.user)

    def check_folder(self, folder: Path) -> None:
        """Check that a folder which clients have named is still where it was: a symlink would show what it leads to.

        Raises:
            PathDenied: it is not.
        """
        if self.hidden is not None and not folder.is_relative_to(self.hidden) and folder.resolve() != folder:
            raise PathDenied(
                f"the folder of the workspace leads elsewhere by now: {folder}", path=str(folder)
            )

    def take_over(self, folder: Path) -> None:
        """Give the boxes a folder with all that is in it; links stay what they are. Blocks.

        Raises:
            OSError: it cannot be done; or a file has names outside of the folder, and is not changed.
        """
        if self.user is None:
            return
        shared: dict[int, list[str]] = {}
        for where, folders, files, place in os.fwalk(folder):
            for name in (*folders, *files):
                with _named(name, place) as descriptor:
                    found = os.stat(descriptor)
                    if stat.S_ISLNK(found.st_mode):
                        continue
                    if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode):
                        os.chown(descriptor, self.user, self.user)
                        continue
                    names = shared.setdefault(found.st_ino, [])
                    names.append(os.path.join(where, name))
                    if len(names) == found.st_nlink:
                        os.chown(descriptor, self.user, self.user)
                        del shared[found.st_ino]
        for names in shared.values():
            raise OSError(errno.EMLINK, "it has other names outside of the workspace; remove one", names[0])
        with _named(folder) as descriptor:
            os.chown(descriptor, self.user, self.user)

    def is_empty(self, folder: Path) -> bool:
        """Whether there is nothing in a folder that belongs to the boxes; True also when it is not there. Blocks."""
        with fsuid(self.user), suppress(FileNotFoundError), os.scandir(folder) as entries:
            return next(entries, None) is None
        return True

    def remove(self, folder: Path) -> None:
        """Remove a folder that belongs to the boxes, as far as it can be done. Blocks."""
        remove_as(folder, self.user)

    async def check(self, data: Path) -> None:
        """Check that a box can be started like this.

        Args:
            data: the server's folder, below which workspaces are.

        Raises:
            IsolationUnavailable: it cannot; the sentence says why, and what to do.
        """
        if self.isolation == "none":
            return
        if self.user is not None and not await in_thread(_reaches, self.user, data):
            mend = "let others pass through the folders above it (chmod o+x), or choose another with --data"
            raise self._refused(f"user {self.user} cannot reach the data folder {data}", mend)
        code, words = await in_thread(_run, self._python(["-c", PROBE]))
        if code != 0:
            raise self._refused(_reason(words), self._mend(words))

    def _python(self, options: list[str], writable: Iterable[Path] = ()) -> list[str]:
        assert self.runtime is not None
        runtime = BoxRuntime(self.runtime)
        if self.isolation == "bwrap":
            return [*self._as_user(), *self._in_namespaces(writable), "--", *runtime.python(MOUNT), *options]
        return [*self._as_user(), *runtime.python(str(self.runtime)), *options]

    def _as_user(self) -> list[str]:
        if self.user is None:
            return []
        who = ["--reuid", str(self.user), "--regid", str(self.user), "--clear-groups", "--no-new-privs"]
        # Bounds first: that takes a capability, which is lost with the others.
        return ["setpriv", *who, "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]

    def _in_namespaces(self, writable: Iterable[Path]) -> list[str]:
        command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--new-session"]
        command += ["--hostname", HOSTNAME, "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            place = Path("/", name)
            if place.is_symlink():
                command += ["--symlink", os.readlink(place), str(place)]
            elif place.is_dir():
                command += ["--ro-bind", str(place), str(place)]
        for name in ETC:
            command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for name in OWN_ETC if self.etc is not None else ():
            command += ["--ro-bind", f"{self.etc}/{name}", f"/etc/{name}"]
        mounts = [(Path(place), ["--size", str(TMPFS_BYTES), "--tmpfs", place]) for place in ("/tmp", "/run")]
        mounts += [(Path("/dev"), ["--dev", "/dev"]), (Path("/proc"), ["--proc", "/proc"])]
        mounts.append((Path("/dev/shm"), ["--size", str(SHM_BYTES), "--tmpfs", "/dev/shm"]))
        mounts.append((Path(MOUNT), ["--ro-bind", str(self.runtime), MOUNT]))
        if self.hidden is not None:
            mounts.append((self.hidden, ["--tmpfs", str(self.hidden)]))
        mounts += [(place, ["--bind", str(place), str(place)]) for place in writable]
        for _, words in sorted(mounts, key=lambda mount: len(mount[0].parts)):  # what is below comes after
            command += words
        if self.hidden is not None:
            command += ["--remount-ro", str(self.hidden)]
        return [*command, "--remount-ro", "/dev", "--remount-ro", "/"]

    def _refused(self, reason: str, mend: str) -> IsolationUnavailable:
        return IsolationUnavailable(
            f"isolation={self.isolation} is not available: {reason}; {mend}",
            phase="isolation",
            wanted=self.isolation,
        )

    def _mend(self, words: str) -> str:
        if self.isolation == "bwrap" and "bwrap: " in words:
            return "allow user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)"
        who = f"user {self.user} must be able to read {self.runtime}, or " if self.user is not None else ""
        return f"{who}choose another isolation"


NOT_CONFINED = Confinement(umask=-1)


@contextmanager
def _named(path: str | Path, place: int | None = None) -> Iterator[str]:
    """A way to what has this name now, that leads to nothing else whatever happens to the name."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


async def confinement(isolation: Isolation, user: int, data: Path) -> Confinement:
    """Return a confinement that works here, checked. With `none` nothing is looked at.

    Args:
        isolation: what is asked for; nothing less is returned.
        user: of the boxes. With bwrap it is the server's own where users cannot be changed.
        data: the server's folder.

    Raises:
        IsolationUnavailable: it is not to be had here; the sentence says why, and what to do.
    """
    if isolation == "none":
        return NOT_CONFINED
    missing = _missing_capabilities()
    wanted = Confinement(isolation, None if isolation == "bwrap" and missing else user, hidden=data)
    programs = {"setpriv": "util-linux"} if wanted.user is not None else {}
    programs |= {"bwrap": "bubblewrap"} if isolation == "bwrap" else {}
    for program, package in programs.items():
        if shutil.which(program) is None:
            raise wanted._refused(f"there is no program {program}", f"install {package}")
    if wanted.user is not None:
        if missing:
            names = ", ".join(missing)
            mend = "start it as root, or with these as ambient capabilities, or set isolation to bwrap"
            raise wanted._refused(f"this server lacks the capabilities {names}", mend)
        if wanted.user in (0, os.geteuid()):
            raise wanted._refused(
                f"box_user {user} is root or the server's own user", "choose another box_user"
            )
    runtime = await box_runtime(data / "runtime", in_place=True)
    if isolation == "user":
        return Confinement(isolation, wanted.user, runtime.path, data)
    etc = data / "runtime" / "etc"
    await in_thread(_lay_out, etc, os.geteuid() if wanted.user is None else wanted.user)
    return Confinement(isolation, wanted.user, runtime.path, data, etc)


def _lay_out(etc: Path, user: int) -> None:
    """Write the files in which this user has a name, and its host an address."""
    etc.mkdir(parents=True, exist_ok=True)
    own = [Path("/etc", name).read_text(errors="surrogateescape") for name in ("passwd", "group")]
    _, passwd, group = with_user(own[0].splitlines(), own[1].splitlines(), user, "/tmp", "/bin/bash")
    told = (passwd or os.fsencode(own[0]), group or os.fsencode(own[1]), HOSTS.encode())
    for name, content in zip(OWN_ETC, told, strict=True):
        (etc / name).write_bytes(content)
        (etc / name).chmod(0o644)
    etc.chmod(0o755)


def _missing_capabilities() -> list[str]:
    """Which of those that it takes to change users are not in effect."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
                return [name for name, number in NEEDED.items() if not effective >> number & 1]
    return list(NEEDED)


def _run(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return -1, str(exc)
    return done.returncode, done.stderr.decode(errors="replace")


def _reason(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1][:_WORDS] if lines else "its box does not start, and says nothing"


def _reaches(user: int, data: Path) -> bool:
    with suppress(OSError), fsuid(user):
        return (data / "workspaces").is_dir()
    return False
