"""File systems of their own: small ones that fill up, and ones whose power can fail."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

IMAGE_BYTES = 64 << 20


async def run(*command: object) -> None:
    """Run a program of this machine; its failure is ours."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    if process.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {said.decode(errors='replace').strip()}")


@asynccontextmanager
async def mounted(place: Path, *what: object) -> AsyncIterator[Path]:
    """Something mounted at a fresh folder; unmounted at the end, whoever still uses it."""
    place.mkdir()
    await run("mount", *what, place)
    try:
        yield place
    finally:
        await asyncio.shield(run("umount", "--lazy", place))


def small(place: Path, size: int):
    """A file system in memory of so many bytes."""
    return mounted(place, "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs")


class Image:
    """An ext4 file system in a file: what is in that file is what the device has, and all that a power loss leaves."""

    def __init__(self, file: Path) -> None:
        self.file = file

    async def make(self) -> None:
        """Make an empty one."""
        with self.file.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        # Without lazy initialisation nothing writes to the device but those who are tested.
        await run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.file)

    def mounted(self, place: Path):
        """Mount it. Nothing is written to the device but what somebody asked to be there, for a long while."""
        return mounted(place, "-t", "ext4", "-o", "loop,commit=300", self.file)

    async def after_power_loss(self, copy: Path) -> Image:
        """What the device has in this moment."""
        await asyncio.to_thread(shutil.copyfile, self.file, copy)
        return Image(copy)
