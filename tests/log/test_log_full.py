"""A disk without room: reading and deleting go on, and writing comes back by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


pytestmark = pytest.mark.skipif(
    run("unshare", "-rm", "true").returncode != 0, reason="needs a mount namespace"
)


def on_a_small_disk(size: str, folder: Path, script: str) -> list[str]:
    """What the script prints; its argument is a folder on a disk of this size."""
    mount = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    python = (sys.executable, "-c", PREFACE + script, str(folder))
    done = run("unshare", "-rm", "sh", "-c", mount, str(folder), *python)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PREFACE = """
import asyncio, os, sys
from pathlib import Path
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import StorageFull
from agent_sdk.protocol.events import UserMessage

FOLDER = Path(sys.argv[1])
NAMES = ["a", "b", "c", "d"]

async def written(log, name):
    return sum([1 async for _ in events(log, name)])

async def events(log, name):
    seq = 0
    while page := await log.read(name, seq):
        for seq, body in page:
            yield seq

async def fill(log, name):
    count = await log.head(name)
    try:
        while True:
            [event] = await log.append(name, [UserMessage(text="x" * 20_000)])
            count += 1
            assert event.seq == count
    except StorageFull:
        return count

def free():
    disk = os.statvfs(FOLDER)
    return disk.f_bavail * disk.f_frsize

async def refused(log):
    try:
        await log.append("a", [UserMessage(text="x" * 20_000)])
    except StorageFull:
        return True
"""


def test_four_writers_fill_the_disk_and_go_on_when_a_conversation_was_deleted(tmp_path):
    script = """
async def main():
    async with EventLog.open(FOLDER / "log.db", sole=True) as log:
        for name in NAMES:
            await log.create(name)
        counts = await asyncio.gather(*(fill(log, name) for name in NAMES))
        print("full:", log.full, await refused(log))
        print("whole:", [await written(log, name) for name in NAMES] == counts)
        before = free()
        await log.delete("b")
        print("freed:", free() - before > counts[1] * 15_000)
        print("goes on:", (await log.append("a", [UserMessage(text="more")]))[0].seq == counts[0] + 1, log.full)
        more = await asyncio.gather(*(fill(log, name) for name in ("a", "c", "d")))
        print("more:", sum(more) > sum(counts) - counts[1])
    async with EventLog.open(FOLDER / "log.db", sole=True) as log:
        print("still there:", [await written(log, name) for name in ("a", "c", "d")] == more)

asyncio.run(main())
"""
    assert on_a_small_disk("16m", tmp_path, script) == [
        "full: True True",
        "whole: True",
        "freed: True",
        "goes on: True False",
        "more: True",
        "still there: True",
    ]


def test_a_disk_without_a_single_free_byte_can_be_opened_and_made_room_on(tmp_path):
    script = """
def ballast(name):
    with (FOLDER / name).open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass

async def main():
    async with EventLog.open(FOLDER / "log.db", sole=True) as log:
        for name in NAMES:
            await log.create(name)
        for name in NAMES[1:]:
            for _ in range(100):
                await log.append(name, [UserMessage(text="x" * 20_000)])
    ballast("ballast")
    print("free:", free())
    async with EventLog.open(FOLDER / "log.db", sole=True) as log:
        await fill(log, "a")
        print("readable:", await written(log, "b"))
        print("refused:", await refused(log))
        await log.delete("b")
        print("goes on:", len(await log.append("a", [UserMessage(text="more")])))
        print("reserve:", (FOLDER / "log.db.reserve").stat().st_size >= 1 << 20)

asyncio.run(main())
"""
    assert on_a_small_disk("16m", tmp_path, script) == [
        "free: 0",
        "readable: 100",
        "refused: True",
        "goes on: 1",
        "reserve: True",
    ]


def test_what_others_free_on_the_disk_is_enough_for_writing_to_come_back(tmp_path):
    script = """
async def main():
    (FOLDER / "ballast").write_bytes(b"x" * (6 << 20))
    async with EventLog.open(FOLDER / "log.db", sole=True) as log:
        await log.create("a")
        count = await fill(log, "a")
        print("full:", log.full)
        (FOLDER / "ballast").unlink()
        [event] = await log.append("a", [UserMessage(text="after")])
        print("after:", event.seq == count + 1, log.full)

asyncio.run(main())
"""
    assert on_a_small_disk("16m", tmp_path, script) == ["full: True", "after: True False"]


def test_while_the_reserve_is_used_up_nothing_but_deletions_is_written(tmp_path):
    script = """
from agent_sdk.log.database import Database

database = Database(FOLDER / "log.db", sole=True)
with database.transaction():
    database.create("a", "epoch", 0.0, b"{}")
print("spent:", database.space.spend())
size = free() - (1 << 20)
with (FOLDER / "ballast").open("wb") as file:
    file.write(b"x" * size)
try:
    database.space.admit()
except StorageFull:
    print("refused")
with database.transaction():
    database.delete("a")
(FOLDER / "ballast").unlink()
database.space.admit()
print("reserve:", (FOLDER / "log.db.reserve").stat().st_size)
database.close()
"""
    lines = on_a_small_disk("16m", tmp_path, script)
    assert lines[:2] == ["spent: True", "refused"]
    assert lines[2] == f"reserve: {2 << 20}"
