"""The users and groups of an image, with the one as whom commands run: so that it has a name for whoever asks.

The image is not changed: what differs is mounted over its own files. They are read through the engine, from a
container of the image that never starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import Struct

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, ImageUnavailable, NotFound
from workspaces.backend import labels

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Engine, Image

NAMES = ("agent", "sandbox", "agent-10001")
"""The first that the image has not given to somebody else."""
LONGEST = 1 << 20
"""Bytes of a file of users; a longer one is not looked at."""
LIFE_SECONDS = 60


class Accounts(Struct, frozen=True):
    """Who is who in a sandbox."""

    name: str = NAMES[0]
    """Of the user of commands."""
    files: tuple[tuple[str, bytes], ...] = ()
    """What is to be at which path; nothing where the image knows that user."""


async def accounts(engine: Engine, image: Image, user: int, home: str) -> Accounts:
    """Return the users of an image, this one among them. What cannot be read is as if it were empty.

    Raises:
        EngineUnavailable, ImageUnavailable, WorkspaceUnavailable: no container can be made of the image.
    """
    async with _looking(engine, image) as container:
        (passwd, known), (group, groups), bash = await asyncio.gather(
            _read(engine, container, "/etc/passwd"),
            _read(engine, container, "/etc/group"),
            _is_there(engine, container, "/bin/bash"),
        )
    name, *contents = with_user(known, groups, user, home, "/bin/bash" if bash else "/bin/sh")
    paths = zip((passwd, group), contents, strict=True)
    return Accounts(name, tuple((path, content) for path, content in paths if content is not None))


async def check_targets(engine: Engine, image: Image, targets: Iterable[str]) -> None:
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
    async with _looking(engine, image) as container:
        found = await asyncio.gather(*(_really(engine, container, way) for way in ways))
    for way, really in zip(ways, found, strict=True):
        if really != way:
            raise ImageUnavailable(
                f"the image has a symlink at {way[:200]}, so nothing can be mounted at {ways[way][:200]}: "
                "choose another place",
                image=image.name,
                phase="create",
            )


@asynccontextmanager
async def _looking(engine: Engine, image: Image) -> AsyncIterator[str]:
    """A container of an image that never starts."""
    body = {
        "Image": image.id,
        "Cmd": ["nothing"],
        "NetworkDisabled": True,
        "Labels": {labels.INSTANCE: "look", labels.EXPIRES: str(int(time.time()) + LIFE_SECONDS)},
    }
    container = await engine.create(f"agent-look-{new_id()}", body)
    try:
        yield container
    finally:
        with suppress(AgentServerError):  # its time is over in a minute, and then the sweep finds it
            await engine.remove(container)


async def _really(engine: Engine, container: str, path: str) -> str:
    with suppress(NotFound):
        return (await engine.read_file(container, path, 0))[0]
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


async def _read(engine: Engine, container: str, path: str) -> tuple[str, list[str]]:
    """Where a file really is, and its lines."""
    folder, _, name = path.rpartition("/")
    with suppress(NotFound):
        folder, _ = await engine.read_file(container, folder, 0)
    path = f"{folder}/{name}"
    with suppress(NotFound):
        path, content = await engine.read_file(container, path, LONGEST)
        return path, content.decode("utf-8", "surrogateescape").splitlines()
    return path, []


async def _is_there(engine: Engine, container: str, path: str) -> bool:
    with suppress(NotFound):
        await engine.read_file(container, path, 0)
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
