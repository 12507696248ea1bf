"""Files that come in parts: what has come waits for the rest, for a while, and is never seen."""

import asyncio
import hashlib
import os

import pytest

from agent_sdk import LocalWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ConnectionLost, OpMismatch, TransferBroken
from agent_sdk.workspace.files import KEPT, LocalFiles, Uploads
from agent_sdk.workspace.paths import Root

DATA = os.urandom(3_000_000)


async def broken(*pieces: tuple[int, bytes]):
    for piece in pieces:
        yield piece
    raise ConnectionLost("the connection ended")


async def rest(since: int):
    yield since, DATA[since:]


@pytest.fixture
async def workspace(tmp_path):
    async with LocalWorkspace(tmp_path, spool_dir=tmp_path.parent / "spool") as workspace:
        yield workspace


async def receive(uploads: Uploads, op_id: str, pieces, *, since: int = 0, path: str = "f"):
    digest = hashlib.sha256(DATA).digest()
    options = {"size": len(DATA), "mode": None, "unpack": False}
    return await uploads.receive(op_id, path, pieces, lambda: digest, since=since, **options)


async def test_the_rest_goes_on_behind_what_has_come(workspace, tmp_path):
    op_id, uploads = new_id(), workspace.uploads
    with pytest.raises(TransferBroken, match="2000000 bytes"):
        await receive(uploads, op_id, broken((0, DATA[:2_000_000])))
    assert (uploads.size(op_id), os.listdir(tmp_path)) == (2_000_000, [])
    with pytest.raises(TransferBroken, match="goes on at 2000000"):
        await receive(uploads, op_id, rest(1), since=1)
    with pytest.raises(OpMismatch):
        await receive(uploads, op_id, rest(2_000_000), since=2_000_000, path="other")
    done = await receive(uploads, op_id, rest(2_000_000), since=2_000_000)
    assert (done.size, uploads.size(op_id)) == (len(DATA), 0)
    assert (tmp_path / "f").read_bytes() == DATA


async def test_who_begins_anew_or_sends_other_bytes_gets_no_mixture(workspace, tmp_path):
    op_id, uploads = new_id(), workspace.uploads
    with pytest.raises(TransferBroken):
        await receive(uploads, op_id, broken((0, bytes(2_000_000))))
    with pytest.raises(TransferBroken, match="SHA-256"):
        await receive(uploads, op_id, rest(2_000_000), since=2_000_000)
    assert (uploads.size(op_id), os.listdir(tmp_path)) == (0, [])
    with pytest.raises(TransferBroken):
        await receive(uploads, op_id, broken((0, bytes(5))))
    await receive(uploads, op_id, rest(0))
    assert (tmp_path / "f").read_bytes() == DATA


async def test_one_that_still_comes_gives_way_and_what_came_is_kept(workspace):
    op_id, uploads = new_id(), workspace.uploads
    came = asyncio.Event()

    async def stalls():
        yield 0, DATA[:7]
        came.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(receive(uploads, op_id, stalls()))
    await came.wait()
    assert uploads.give_way(op_id)
    with pytest.raises(TransferBroken, match="another call"):
        await first
    assert (uploads.size(op_id), uploads.give_way(op_id)) == (7, False)


async def test_who_cancels_wants_nothing_kept(workspace):
    op_id, uploads = new_id(), workspace.uploads
    came = asyncio.Event()

    async def stalls():
        yield 0, DATA[:7]
        came.set()
        await asyncio.Event().wait()

    first = asyncio.create_task(receive(uploads, op_id, stalls()))
    await came.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert uploads.size(op_id) == 0


async def test_what_nobody_comes_back_for_is_removed_in_time(tmp_path):
    uploads = Uploads(LocalFiles(Root(str(tmp_path))), seconds=0)
    op_id = new_id()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransferBroken):
        await receive(uploads, op_id, broken((0, DATA)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert uploads.size(op_id) == 0
    await uploads.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path) == []


async def test_the_oldest_gives_way_where_too_many_wait(workspace):
    uploads, ids = workspace.uploads, [new_id() for _ in range(KEPT + 1)]
    for op_id in ids:
        with pytest.raises(TransferBroken):
            await receive(uploads, op_id, broken((0, b"x")), path=op_id)
    assert [uploads.size(op_id) for op_id in ids] == [0] + [1] * KEPT
