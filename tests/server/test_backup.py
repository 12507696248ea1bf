"""A backup: what is in it, what refuses it, and that docs/operations.md is right about making and using one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import InvalidParams, PathExists, PathNotFound
from agent_sdk.protocol.events import UserMessage
from agent_server.cli.server import backup
from agent_server.data_folder import DataFolder
from tests.conftest import SHORT_LIVED
from tests.server.test_serve import started

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def block(chapter: str) -> str:
    """The commands of a chapter."""
    return re.search(rf"## {chapter}\n.*?```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


async def test_a_backup_of_a_working_server_is_made_and_restored_as_the_page_says(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "agent-server").write_text(f'#!/bin/sh\nexec {sys.executable} -m agent_server "$@"\n')
    (tmp_path / "bin" / "agent-server").chmod(0o700)
    environment = {
        **{"DATA": str(tmp_path / "data"), "BACKUPS": str(tmp_path), "RESTORED": str(tmp_path / "restored")},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        **SHORT_LIVED,
    }
    async with started(tmp_path / "data") as server, server.session() as wire:
        await wire.call("set_title", 1, op_id=new_id(), title="precious")
        await wire.call("execute", 2, op_id=new_id(), shell="echo made > file")
        [box] = server.boxes()
        shell = await asyncio.create_subprocess_shell(block("Backup"), env={**os.environ, **environment})
        assert await shell.wait() == 0
        await wire.call("set_title", 3, op_id=new_id(), title="later")

        assert box.is_running()
        id, key = wire.answered["conversation"], server.key_file.read_text()
    assert stat.S_IMODE((tmp_path / "monday").stat().st_mode) == 0o700
    restored = block("Restore").replace("agent-server serve", "exec agent-server serve --json --port 0")
    process = await asyncio.create_subprocess_shell(
        restored, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE
    )
    try:
        ready = json.loads(await process.stdout.readline())
        assert Path(ready["api_key_file"]).read_text() == key
        async with RemoteWorkspace(ready["url"], key.strip(), conversation=id) as workspace:
            assert (await workspace.execute("cat file")).stdout == "made\n"
    finally:
        process.terminate()
        await process.wait()
    async with EventLog.open(tmp_path / "restored" / "log.db") as log:
        titles = [json.loads(body)["title"] for _, body in await log.read(id) if b'"title"' in body]
    assert titles == ["precious"]


async def test_a_backup_of_a_log_that_is_written_to_is_of_one_moment(tmp_path):
    folder = DataFolder(tmp_path / "data")
    async with EventLog.open(folder.log) as log:
        for name in "ab":
            await log.create(name)
        done = asyncio.Event()

        async def write() -> None:
            while not done.is_set():
                for name in "ab":  # so that a never has fewer than b
                    await log.append(name, [UserMessage(text="x" * 2000)])

        writing = asyncio.create_task(write())
        for nth in range(3):
            assert await backup(folder, tmp_path / f"copy{nth}") == 2
        done.set()
        await writing
    for nth in range(3):
        async with EventLog.open(tmp_path / f"copy{nth}" / "log.db", sole=True) as copy:
            assert copy.recovered == ()
            heads = [await copy.head(name) for name in "ab"]
            assert heads[0] - heads[1] in (0, 1)
            assert len(await copy.read("a", limit=1 << 20, max_bytes=1 << 30)) == heads[0]


async def test_a_backup_that_cannot_be_made_leaves_nothing(tmp_path):
    folder = DataFolder(tmp_path / "data")
    with pytest.raises(PathNotFound, match="there is no log.db to back up"):
        await backup(folder, tmp_path / "copy")
    async with EventLog.open(folder.log):
        (tmp_path / "there").mkdir()
        with pytest.raises(PathExists, match="exists; name a folder that does not"):
            await backup(folder, tmp_path / "there")
        with pytest.raises(InvalidParams, match="lies in the data folder"):
            await backup(folder, folder.root / "copy")
        making = asyncio.create_task(backup(folder, tmp_path / "copy"))
        await asyncio.sleep(0)
        making.cancel()
        await asyncio.wait([making])
    assert making.cancelled()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "there"]
    assert list((tmp_path / "there").iterdir()) == []
