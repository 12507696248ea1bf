"""A large file goes up and comes back over the one WebSocket, and nobody's memory notices."""

import asyncio
import hashlib
import os

from agent_sdk import RemoteWorkspace
from bench.measure import children, forget_peak, peak_mib, rss_mib

SIZE = 256 << 20
ALLOWED_MIB = 16


def write_large(path):
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for nth in range(SIZE >> 20):
            file.write(nth.to_bytes(8, "big") + block[8:])


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def test_a_large_file_goes_up_and_down_in_constant_memory(running_server, tmp_path):
    write_large(tmp_path / "source")
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        box = (await workspace.describe()).pid
        assert box in children(running_server.pid)
        await workspace.upload(tmp_path / "source", "first")  # what is loaded and allocated once, is now
        pids = (os.getpid(), running_server.pid, box)
        for pid in pids:
            forget_peak(pid)
        before = [rss_mib(pid) for pid in pids]
        up = await workspace.upload(tmp_path / "source", "big")
        down = await workspace.download("big", tmp_path / "back")
        grown = [peak_mib(pid) - start for pid, start in zip(pids, before, strict=True)]
        assert up.sha256 == down.sha256 == sha256(tmp_path / "source") == sha256(tmp_path / "back")
        assert up.size == down.size == SIZE
        assert max(grown) <= ALLOWED_MIB, grown


async def test_commands_are_answered_while_a_file_goes_up(running_server, tmp_path):
    write_large(tmp_path / "source")
    async with RemoteWorkspace(running_server.url, running_server.api_key) as workspace:
        uploading = asyncio.create_task(workspace.upload(tmp_path / "source", "big"))
        answered = 0
        while not uploading.done():
            assert (await workspace.execute("echo hi")).stdout == "hi\n"
            answered += 1
        await uploading
        assert answered > 3
