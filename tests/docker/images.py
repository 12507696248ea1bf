"""The images that tests of containers use, made on this machine: `python -m tests.docker.images`.

No registry is asked. Debian comes through this machine's own APT sources, busybox from its package.
"""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FULL = "agent-test/full:1"
"""Debian with what an agent server needs: bash, git, Python."""
BARE = "agent-test/bare:1"
"""Debian without Python."""
BUSYBOX = "agent-test/busybox:1"
"""One static program: no libc, no bash, no Python."""

SUITE = "bookworm"
PACKAGES = {
    FULL: "bash ca-certificates git iproute2 procps python3 python3-venv tini util-linux",
    BARE: "",
}


class Missing(Exception):
    """A tool is not on this machine; the message says what to install."""


def main() -> int:
    try:
        with ThreadPoolExecutor() as pool:
            for done in pool.map(ensure, (BUSYBOX, BARE, FULL)):
                print(done)
    except (Missing, subprocess.CalledProcessError) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def ensure(name: str) -> str:
    if is_there(name):
        return f"{name} is there"
    make(name)
    return f"{name} was made"


def is_there(name: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode == 0


def make(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="test-image-") as folder:
        archive = Path(folder) / "root.tar"
        if name == BUSYBOX:
            archive.write_bytes(busybox())
            load(archive, name, "PATH=/bin")
        else:
            debian(archive, PACKAGES[name])
            load(archive, name, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")


def load(archive: Path, name: str, environment: str, *engine: str) -> None:
    """Make an image of a root file system; `engine`: options that name another engine than the usual one."""
    change = ["--change", f"ENV {environment}", "--change", 'CMD ["sh"]']
    subprocess.run(
        ["docker", *engine, "import", *change, str(archive), name], check=True, capture_output=True
    )


def debian(archive: Path, packages: str) -> None:
    command = [tool("mmdebstrap"), "--quiet", "--variant=minbase", *how_to_fetch()]
    command += ["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"]
    if packages:
        command.append(f"--include={packages.replace(' ', ',')}")
    # What this machine's package manager uses is what it can reach.
    subprocess.run([*command, SUITE, str(archive), *sources()], check=True)


def sources() -> list[str]:
    folder = Path("/etc/apt")
    found = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    return [str(path) for path in found if path.suffix in (".list", ".sources") and path.is_file()]


def how_to_fetch() -> list[str]:
    """This machine's settings for that, such as a proxy."""
    settings = sorted(Path("/etc/apt/apt.conf.d").glob("*"))
    return [f"--aptopt={path}" for path in settings if "Acquire::" in path.read_text(errors="replace")]


def busybox() -> bytes:
    """A root file system with one program under many names."""
    path = tool("busybox")
    program = Path(path).read_bytes()
    applets = subprocess.run([path, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(program), 0o755
        archive.addfile(entry, io.BytesIO(program))
        for applet in applets:
            if applet == "busybox":
                continue
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return buffer.getvalue()


def tool(name: str) -> str:
    found = shutil.which(name)
    package = {"busybox": "busybox-static"}.get(name, name)
    if found is None:
        raise Missing(f"{name} is missing: apt-get install {package}")
    return found


if __name__ == "__main__":
    sys.exit(main())
