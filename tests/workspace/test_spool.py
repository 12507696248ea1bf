"""What one stream said is kept by offset, in bounded memory, with exact counts."""

import asyncio
import os
from pathlib import Path

import pytest

from agent_sdk.workspace.output import HEAD_BYTES, TAIL_BYTES
from agent_sdk.workspace.spool import PENDING_BYTES, Spool


@pytest.fixture
async def make(tmp_path):
    made: list[Spool] = []

    def make(**options) -> Spool:
        made.append(Spool(str(tmp_path / f"spool-{len(made)}"), **options))
        return made[-1]

    yield make
    for spool in made:
        await spool.close()
    assert os.listdir(tmp_path) == []


def numbers(start: int, size: int) -> bytes:
    """Bytes that tell where in a stream they belong."""
    first = start // 8
    text = b"".join(b"%07d\n" % number for number in range(first, first + size // 8 + 2))
    return text[start % 8 : start % 8 + size]


async def whole(spool: Spool) -> tuple[bytes, list[int]]:
    """All kept bytes, and the offsets where they go on after a gap."""
    data, position, gaps = b"", 0, []
    while True:
        found, piece = await spool.read(position, 100_000)
        if not piece:
            return data, gaps
        if found != position:
            gaps.append(found)
        data += piece
        position = found + len(piece)


async def fed(spool: Spool, size: int, piece: int) -> Spool:
    for start in range(0, size, piece):
        spool.feed(numbers(start, min(piece, size - start)))
    await spool.settle()
    return spool


async def test_little_output_needs_no_file(make):
    spool = await fed(make(), 1000, 7)
    assert await whole(spool) == (numbers(0, 1000), [])
    assert not spool.has_file
    assert not os.path.exists(spool.path)


@pytest.mark.parametrize("piece", [333, 65_536, 100_000])
async def test_much_output_is_read_back_from_its_file(make, piece):
    spool = await fed(make(), 300_000, piece)
    assert await whole(spool) == (numbers(0, 300_000), [])
    assert spool.on_disk == os.path.getsize(spool.path) == 300_000


async def test_output_can_be_read_before_it_is_on_the_disk(make):
    spool = make()
    spool.feed(numbers(0, 200_000))
    spool.feed(numbers(200_000, 200_000))
    assert spool.on_disk == 0
    assert await whole(spool) == (numbers(0, 400_000), [])


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("size", [200_001, TAIL_BYTES + 200_000, 3 * TAIL_BYTES + 123_457])
async def test_past_the_capacity_the_last_mebibyte_is_kept(make, size, final):
    spool = await fed(make(capacity=200_000), size, 99_991)
    await spool.settle(final=final)
    tail = max(200_000, size - TAIL_BYTES)
    expected = numbers(0, 200_000) + numbers(tail, size - tail)
    assert await whole(spool) == (expected, [] if tail == 200_000 else [tail])
    assert spool.size == size


async def test_the_settled_file_says_what_is_missing(make):
    spool = await fed(make(capacity=200_000), 5_000_000, 100_000)
    text = Path(spool.path).read_bytes()
    missing = 5_000_000 - 200_000 - TAIL_BYTES
    assert text == numbers(0, 200_000) + b"\n[... %d bytes left out ...]\n" % missing + numbers(
        5_000_000 - TAIL_BYTES, TAIL_BYTES
    )


async def test_memory_is_given_back_when_nothing_more_will_come(make):
    spool = await fed(make(capacity=200_000), 5_000_000, 100_000)
    assert spool.wrapped
    await spool.settle(final=True)
    assert not spool.wrapped


@pytest.mark.parametrize("size", [0, 10, HEAD_BYTES, HEAD_BYTES + 1, HEAD_BYTES + TAIL_BYTES, 4_000_000])
async def test_a_result_has_head_tail_and_size(make, size):
    output = await (await fed(make(capacity=300_000), size, 50_021)).output()
    assert (output.size, output.head) == (size, numbers(0, min(size, HEAD_BYTES)))
    rest = max(0, size - HEAD_BYTES)
    assert output.tail == (numbers(size - min(rest, TAIL_BYTES), min(rest, TAIL_BYTES)) if rest else b"")


async def test_a_slice_is_what_came_since(make):
    spool = await fed(make(), 500_000, 10_000)
    output = await spool.output(400_000)
    assert output.size == 100_000
    assert output.head + output.tail == numbers(400_000, 100_000)


async def test_the_feeder_is_asked_to_wait_until_the_disk_has_caught_up(make):
    spool, room = make(), asyncio.Event()
    spool.on_room = room.set
    spool.feed(bytes(PENDING_BYTES))
    assert spool.full
    async with asyncio.timeout(10):
        await room.wait()
    assert not spool.full


async def test_readers_are_told_when_more_comes(make):
    spool = make()
    change = spool.changed()
    assert not change.done()
    spool.feed(b"x")
    assert change.done()


async def test_a_full_disk_costs_the_middle_and_nothing_else(make, tmp_path):
    spool = make()
    os.symlink("/dev/full", spool.path)
    spool.feed(numbers(0, 300_000))
    spool.feed(numbers(300_000, 2_000_000))
    await spool.settle()
    spool.feed(numbers(2_300_000, 100_000))
    output = await spool.output()
    assert (output.size, output.head) == (2_400_000, numbers(0, HEAD_BYTES))
    assert output.tail == numbers(2_400_000 - TAIL_BYTES, TAIL_BYTES)


async def test_a_closed_spool_has_nothing_to_read(make):
    spool = await fed(make(), 300_000, 100_000)
    await spool.close()
    assert await spool.read(0, 10) == (0, b"")
    assert not os.path.exists(spool.path)
