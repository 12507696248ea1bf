"""The machine of a box in a sandbox: what it is described as, who is who in it, and whether it is what was asked for.

The image is not changed: where its users have to be others, a file is mounted over its own. It is read where it has
never run. Clients may own what they have mounted, and swap a folder for a symlink at any moment. The engine follows
that; so what is allowed is walked to without symlinks, and what the sandbox has got has to be the very same.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from msgspec import Struct

from agent_sdk.protocol.errors import ImageUnavailable, InvalidParams, NotFound, PolicyDenied
from agent_sdk.protocol.results import Profile
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.workspace.users import HIGHEST
from workspaces.backend.contract import (
    FOLDER,
    HOSTNAME,
    KERNEL,
    LEAST_MEMORY,
    OUTPUT,
    RUNTIME,
    TEMPORARY,
    UID,
    WORKSPACE,
    Backend,
    Image,
    Look,
    Machine,
    Mount,
    parse_size,
)
from workspaces.box.folder import READY

RESERVED = (WORKSPACE, FOLDER, OUTPUT, RUNTIME, "/tmp", "/run")
ENVIRONMENT: Mapping[str, str] = {
    "HOME": WORKSPACE,
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
"""Of the box; its commands have that of the image as well."""
NAMES = ("agent", "sandbox", "agent-10001")
"""The first that the image has not given to somebody else."""
LONGEST = 1 << 20
"""Bytes of a file of users; a longer one is not looked at."""
TASKS = 1 << 5 | 1 << 6 | 1 << 7
"""What the box of a task keeps, and its commands do not: KILL, SETGID, SETUID."""
FILTERED = 2
"""Of a process whose system calls are filtered, as /proc/self/status has it."""
_FROM_THE_ENGINE = (
    "/",
    "/etc/resolv.conf",
    "/etc/hostname",
    "/etc/hosts",
)
_PASS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Accounts(Struct, frozen=True):
    """Who is who in a sandbox."""

    name: str = NAMES[0]
    """Of the user of commands."""
    files: tuple[tuple[str, bytes], ...] = ()
    """What is to be at which path; nothing where the image knows that user."""


class Places(Struct, frozen=True):
    """Where a sandbox keeps its files, on this machine."""

    workspace: Path
    output: Path
    temporary: tuple[Path, ...]
    """As many as were asked for, empty."""
    folder: Path
    """Of the box: its socket."""
    etc: Path
    """Of the box: what is mounted over files of the image."""
    runtime: Path
    root_size: int | None = None
    """Bytes of the root, where it is writable and has a limit."""


def temporary(spec: Sandbox, image: Image) -> list[str]:
    """Return the folders that are writable and do not last: `/tmp`, those asked for, and the volumes of the image.

    Raises:
        ImageUnavailable: a volume of the image would be where a sandbox cannot have one.
    """
    wanted = ["/tmp", *spec.writable]
    for volume in image.volumes:
        path = PurePosixPath(volume)
        inside = any(path.is_relative_to(place) for place in KERNEL)
        around = any(PurePosixPath(place).is_relative_to(path) for place in (RUNTIME, *KERNEL))
        if not path.is_absolute() or ".." in path.parts or str(path) != volume or inside or around:
            raise ImageUnavailable(
                f"the image has a volume at {volume[:200]!r}, where a sandbox cannot have one; build it without",
                image=image.id,
                phase="create",
            )
        if volume not in (*RESERVED, *wanted):
            wanted.append(volume)
    return wanted


def box_machine(
    spec: Sandbox,
    image: Image,
    accounts: Accounts,
    places: Places,
    temporary: Iterable[str],
    *,
    name: str,
    labels: Mapping[str, str],
    command: Sequence[str],
    linger: float,
    runtime: str,
) -> Machine:
    """Return the machine of a box.

    Args:
        spec: what was asked for.
        image: of the machine, by its id, so that a tag that is moved meanwhile changes nothing.
        accounts: its users.
        places: what lasts, and what is ours.
        temporary: where each of the folders that do not last is in the machine.
        name: of the machine.
        labels: of the machine.
        command: how a box is started; its options follow.
        linger: seconds it goes on without any connection.
        runtime: how it is isolated.

    Raises:
        InvalidParams: a size makes no sense.
    """
    is_task = spec.profile == "task"
    begin = (image.working_dir or "/") if is_task else WORKSPACE
    options = ["--folder", FOLDER, "--root", "/", "--working-dir", begin, "--spool", OUTPUT]
    if is_task:
        options += ["--user", spec.user or image.user or "root"]
    options += ["--linger", str(linger), "--ready", f"{FOLDER}/{READY}", "--seccomp", "--init"]
    own = [(places.workspace, WORKSPACE), (places.folder, FOLDER), (places.output, OUTPUT)]
    own += zip(places.temporary, temporary, strict=True)
    fixed = [(places.runtime, RUNTIME)]
    fixed += [(places.etc / str(number), target) for number, (target, _) in enumerate(accounts.files)]
    targets = {target for _, target in own}
    return Machine(
        name=name,
        labels=labels,
        profile="task" if is_task else "box",
        image=image.id,
        platform=spec.platform,
        pull="never",
        command=(*command, *options),
        working_dir=begin,
        env=ENVIRONMENT,
        without_env=tuple(each for line in image.env if (each := line.split("=", 1)[0]) not in ENVIRONMENT),
        cpus=spec.cpus,
        memory=parse_size("sandbox.memory", spec.memory, least=LEAST_MEMORY),
        pids=spec.pids,
        gpus=spec.gpus,
        runtime=runtime,
        mounts=(
            *(Mount(str(source), target, here=True) for source, target in own),
            *(Mount(str(source), target, read_only=True, here=True) for source, target in fixed),
            *map(_mount, spec.mounts),
        ),
        volumes=tuple(each for each in image.volumes if each not in targets) if is_task else (),
        root_size=places.root_size,
        ports=(),
        network=spec.network,
    )


def command_environment(image: Image, accounts: Accounts, spec: Sandbox) -> dict[str, str]:
    """Return what all commands find in their environment: what the image says, and who they are.

    Git takes its address from there as long as nobody has configured one. The box of a task finds the rest itself.
    """
    of_image = dict(line.split("=", 1) for line in image.env if "=" in line)
    usual = {name: value for name, value in ENVIRONMENT.items() if name != "HOME"}
    name = accounts.name
    if spec.profile == "task":
        return {**usual, **of_image, "EMAIL": f"{spec.user or name}@{HOSTNAME}"}
    own = {"HOME": WORKSPACE, "USER": name, "LOGNAME": name, "EMAIL": f"{name}@{HOSTNAME}"}
    return {**usual, **of_image, **own}


def _mount(mount: str) -> Mount:
    source, target, *options = mount.split(":")
    return Mount(source, target, read_only="ro" in options)


async def accounts(backend: Backend, image: Image) -> Accounts:
    """Return the users of an image, the one of commands among them. What cannot be read is as if it were empty.

    Raises:
        EngineUnavailable, ImageUnavailable, WorkspaceUnavailable: no container can be made of the image.
    """
    async with backend.looking(image) as look:
        (passwd, known), (group, groups), bash = await asyncio.gather(
            _read(look, "/etc/passwd"), _read(look, "/etc/group"), _is_there(look, "/bin/bash")
        )
    name, *contents = with_user(known, groups, UID, WORKSPACE, "/bin/bash" if bash else "/bin/sh")
    paths = zip((passwd, group), contents, strict=True)
    return Accounts(name, tuple((path, content) for path, content in paths if content is not None))


async def check_targets(backend: Backend, image: Image, targets: Iterable[str]) -> None:
    """Check that the image leads no mount elsewhere: the engine would follow a symlink to whatever of ours is there.

    Raises:
        ImageUnavailable: there is a symlink on the way.
        EngineUnavailable, WorkspaceUnavailable: no container can be made of the image.
    """
    ways = {
        "/".join(parts[: length + 1]): target
        for target in targets
        for parts in [target.split("/")]
        for length in range(1, len(parts))
    }
    if not ways:
        return
    async with backend.looking(image) as look:
        found = await asyncio.gather(*(_really(look, way) for way in ways))
    for way, really in zip(ways, found, strict=True):
        if really != way:
            raise ImageUnavailable(
                f"the image has a symlink at {way[:200]}, so nothing can be mounted at {ways[way][:200]}: "
                "choose another place",
                image=image.name,
                phase="create",
            )


async def _really(look: Look, path: str) -> str:
    with suppress(NotFound):
        return (await look(path, 0))[0]
    return path


def with_user(
    passwd: Sequence[str], group: Sequence[str], user: int, home: str, shell: str
) -> tuple[str, bytes | None, bytes | None]:
    """Return the name of a user, and files of users and groups that have it; None: that one has it already."""
    if (name := _named(passwd, user)) is not None:
        return name, None, None
    taken = {line.split(":", 1)[0] for line in (*passwd, *group)}
    name = next((name for name in NAMES if name not in taken), NAMES[-1])
    users = _with(
        passwd or ["root:x:0:0:root:/root:/bin/sh"], f"{name}:x:{user}:{user}:{name}:{home}:{shell}"
    )
    known = _named(group, user) is not None
    return name, users, None if known else _with(group or ["root:x:0:"], f"{name}:x:{user}:")


async def _read(look: Look, path: str) -> tuple[str, list[str]]:
    """Where a file really is, and its lines."""
    folder, _, name = path.rpartition("/")
    with suppress(NotFound):
        folder, _ = await look(folder, 0)
    path = f"{folder}/{name}"
    with suppress(NotFound):
        path, content = await look(path, LONGEST)
        return path, content.decode("utf-8", "surrogateescape").splitlines()
    return path, []


async def _is_there(look: Look, path: str) -> bool:
    with suppress(NotFound):
        await look(path, 0)
        return True
    return False


def _named(lines: Iterable[str], number: int) -> str | None:
    """The name that a file of users or groups has for a number."""
    for line in lines:
        fields = line.split(":")
        if len(fields) > 2 and fields[0] and fields[2] == str(number):
            return fields[0]
    return None


def _with(lines: Iterable[str], line: str) -> bytes:
    return "".join(f"{each}\n" for each in (*lines, line)).encode("utf-8", "surrogateescape")


class Source(NamedTuple):
    """Which file or folder is to be at a place of a sandbox."""

    target: str
    device: int
    inode: int


def sources(mounts: Iterable[str], allowed: Iterable[str]) -> tuple[Source, ...]:
    """Return what the mounts of a sandbox are at this moment. Blocks.

    Raises:
        PolicyDenied: one is not below an allowed folder, or a symlink is on the way.
        InvalidParams: it is not there any more.
    """
    tops = [os.path.realpath(folder) for folder in allowed]
    pairs = [mount.split(":")[:2] for mount in mounts]
    return tuple(_source(source, target, tops) for source, target in pairs)


def _source(source: str, target: str, tops: Iterable[str]) -> Source:
    top = next((top for top in tops if source == top or source.startswith(f"{top.rstrip('/')}/")), None)
    if top is None:
        raise PolicyDenied(
            f"sandbox.mounts: {source[:200]} is not below a folder this server allows; "
            "its option sandbox_mounts says which"
        )
    with ExitStack() as stack:
        try:
            here = _opened(stack, top, None)
            for name in filter(None, source[len(top) :].split("/")):
                here = _opened(stack, name, here)
                if stat.S_ISLNK(os.fstat(here).st_mode):
                    raise PolicyDenied(
                        f"sandbox.mounts: {source[:200]} leads elsewhere by now: {name[:200]} is a symlink; "
                        "put back what was there, or make another conversation"
                    )
            found = os.fstat(here)
        except FileNotFoundError:
            raise InvalidParams(
                f"sandbox.mounts: there is no {source[:200]} on the server's machine any more"
            ) from None
    return Source(target, found.st_dev, found.st_ino)


def _opened(stack: ExitStack, name: str, folder: int | None) -> int:
    descriptor = os.open(name, _PASS, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor


def box_differences(machine: Machine, profile: Profile | None, *, own_kernel: bool = False) -> list[str]:
    """Return what the box finds in force in another way than asked, one phrase each.

    Args:
        machine: what was asked for.
        profile: what the box says.
        own_kernel: whether it has one, whose limits and system calls are not those of this machine.
    """
    if profile is None:
        return ["the box does not say what is in force"]
    return list(_differences(machine, profile, own_kernel))


def mount_differences(sources: Iterable[Source], profile: Profile | None) -> list[str]:
    """Return what is mounted of the machine, but is something else than what was allowed, one phrase each."""
    found = {mount.target: (mount.device, mount.inode) for mount in (profile.mounts if profile else ())}
    return [
        f"what is mounted at {source.target} is not what was allowed"
        for source in sources
        if found.get(source.target) != (source.device, source.inode)
    ]


def _differences(asked: Machine, found: Profile, own_kernel: bool) -> Iterator[str]:
    is_task = asked.profile == "task"
    if not is_task and {found.uid, found.gid, *found.groups} != {UID}:
        yield f"it runs as {found.uid}:{found.gid} with the groups {found.groups}"
    if is_task and max(found.uid, found.gid, *found.groups) > HIGHEST:
        yield f"it runs as {found.uid}:{found.gid} with the groups {found.groups}"
    kept = TASKS if is_task else 0
    for name, value, most in (
        ("effective", found.capabilities, kept),
        ("bound", found.capabilities_bound, 0),
    ):
        if not _is_within(value, most):
            yield f"its {name} capabilities are {value[:32]}"
    if not own_kernel:
        if not found.no_new_privileges:
            yield "it may gain privileges"
        if found.seccomp != FILTERED or found.seccomp_filters == 1:  # 0: the kernel does not say
            yield "its system calls are not filtered twice, by the engine and by the box"
        yield from _limits(asked, found)
    if found.read_only_root == is_task:
        yield "its root is read-only" if is_task else "its root is writable"
    if asked.network in (None, "none") and set(found.interfaces) - {"lo"}:
        yield f"it has the networks {', '.join(found.interfaces)[:200]}"
    yield from _mounts(asked, found)


def _is_within(capabilities: str, most: int) -> bool:
    """Whether capabilities as the kernel writes them are none besides these."""
    try:
        return not int(capabilities or "0", 16) & ~most
    except ValueError:
        return False


def _limits(asked: Machine, found: Profile) -> Iterator[str]:
    limits: Sequence[tuple[str, int | None, int]] = (
        ("pids", found.pids_max, asked.pids or 0),
        ("memory", found.memory_max, asked.memory or 0),
    )
    for name, got, wanted in limits:
        if got is None or got > wanted:
            yield f"its limit of {name} is {got} instead of {wanted}"


def _mounts(asked: Machine, found: Profile) -> Iterator[str]:
    ours = {mount.target: mount.read_only for mount in asked.mounts} | dict.fromkeys(asked.volumes, False)
    seen = {mount.target: mount for mount in found.mounts}
    for target, read_only in ours.items():
        if target not in seen:
            yield f"{target} is not mounted"
        elif read_only and "ro" not in seen[target].options:
            yield f"{target} is writable"
    for target in seen:
        known = target in ours or target in TEMPORARY or target in _FROM_THE_ENGINE
        if (
            not known
            and not target.startswith(tuple(f"{place}/" for place in KERNEL))
            and target not in KERNEL
        ):
            yield f"there is a mount at {target[:200]}"
