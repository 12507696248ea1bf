"""Bytes over a line on which no connection lives long enough for all of them: they go on where they were."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_sdk import Agent, Conversation, RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import ChangedDuringRead
from agent_sdk.protocol.methods.conversation import Delete
from agent_sdk.remote.link import ask
from agent_sdk.testing import ScriptedLLM, say
from tests.chaos.proxy import Direction, Proxy

DATA = os.urandom(350_000)
LIFE = 100_000
"""Bytes after which each connection is cut."""


@asynccontextmanager
async def cut_again_and_again(server, proxy: Proxy, way: Direction, life: int = LIFE):
    """A workspace over connections each of which ends after so many bytes."""
    url = f"http://127.0.0.1:{proxy.port}"
    async with RemoteWorkspace(url, server.api_key) as workspace:
        await workspace.execute("true")  # there is a box
        proxy.cuts += [(way, life)] * 100
        proxy.cut()
        yield workspace
        proxy.cuts.clear()
        proxy.cut()
        await ask(workspace.link, Delete(op_id=new_id()))


@pytest.fixture
async def up(running_server, proxy) -> AsyncIterator[RemoteWorkspace]:
    async with cut_again_and_again(running_server, proxy, "up") as workspace:
        yield workspace


@pytest.fixture
async def down(running_server, proxy) -> AsyncIterator[RemoteWorkspace]:
    async with cut_again_and_again(running_server, proxy, "down") as workspace:
        yield workspace


async def test_an_upload_arrives_although_no_connection_lives_long_enough(up, proxy, tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    told: list[tuple[int, int]] = []
    sent = await up.upload(tmp_path / "f", "f", on_progress=lambda done, total: told.append((done, total)))
    assert sent.size == len(DATA)
    assert proxy.connections > len(DATA) // LIFE
    assert proxy.connections < 50
    assert told == sorted(set(told))
    assert (told[0], told[-1]) == ((0, len(DATA)), (len(DATA), len(DATA)))
    proxy.cuts.clear()
    proxy.cut()
    assert await up.files.read("f") == DATA


async def test_what_is_written_from_memory_arrives_as_well(up, proxy):
    assert (await up.files.write("f", DATA)).size == len(DATA)
    assert (await up.execute("wc -c <f; ls -A")).stdout == f"{len(DATA)}\nf\n"


async def test_pieces_that_are_had_once_arrive_as_well(up):
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(DATA), 10_000):
            await asyncio.sleep(0)
            yield DATA[start : start + 10_000]

    assert (await up.write_stream("f", pieces(), size=len(DATA))).size == len(DATA)
    digest = (await up.execute("sha256sum <f")).stdout.split()[0]
    assert digest == hashlib.sha256(DATA).hexdigest()


async def test_a_download_arrives_although_no_connection_lives_long_enough(down, proxy, tmp_path):
    proxy.cuts.clear()
    proxy.cut()
    await down.files.write("f", DATA)
    proxy.cuts += [("down", LIFE)] * 100
    proxy.cut()
    told: list[tuple[int, int]] = []
    got = await down.download("f", tmp_path / "f", on_progress=lambda *position: told.append(position))
    assert (got.size, (tmp_path / "f").read_bytes()) == (len(DATA), DATA)
    assert told == sorted(set(told))
    assert (told[0], told[-1]) == ((0, len(DATA)), (len(DATA), len(DATA)))
    assert await down.files.read("f") == DATA
    async with down.read_stream("f", offset=50_000) as stream:
        assert stream.size == len(DATA)
        assert b"".join([piece async for piece in stream]) == DATA[50_000:]


async def test_a_file_that_changes_between_two_connections_is_not_passed_off_as_whole(
    running_server, proxy, tmp_path
):
    async with cut_again_and_again(running_server, proxy, "down") as workspace:
        proxy.cuts.clear()
        proxy.cut()
        await workspace.files.write("f", DATA)
        proxy.cuts += [("down", LIFE)]
        proxy.cut()
        with pytest.raises(ChangedDuringRead):
            async with workspace.read_stream("f") as stream:
                async for _ in stream:
                    if proxy.connections > 3:
                        break
                proxy.cut()
                await workspace.execute("head -c 600000 /dev/zero > f")
                async for _ in stream:
                    pass
        assert not (tmp_path / "f").exists()


async def test_a_file_that_changes_with_every_connection_is_not_read_for_ever(down, proxy):
    await down.files.write("f", DATA)
    file = Path((await down.execute("pwd")).stdout.strip(), "f")
    proxy.on_connection = lambda: file.write_bytes(os.urandom(len(DATA)))
    with pytest.raises(ChangedDuringRead, match="changed in each of 5 readings"):
        await down.files.read("f")


SAY = ["sh", "-c", "echo once >>runs; head -c 600000 /dev/zero | tr '\\0' a; echo b >&2; wc -l <runs"]
SAID = "a" * 600_000 + "1\n"


@pytest.mark.parametrize("heard", [False, True], ids=["at its end", "as it comes"])
async def test_the_output_of_a_command_arrives_although_no_connection_lives_long_enough(down, proxy, heard):
    told: list[bytes] = []

    def hear(name: str, data: bytes) -> None:
        told.append(data if name == "stdout" else b"")

    result = await down.execute(SAY, on_output=hear if heard else None)
    assert (result.stdout == SAID, result.stderr, result.exit_code) == (True, "b\n", 0)
    assert b"".join(told) == (SAID.encode() if heard else b"")
    assert len(SAID) // LIFE < proxy.connections < 50


async def test_what_a_command_reads_arrives_although_no_connection_lives_long_enough(up, proxy):
    result = await up.execute("echo once >>runs; sha256sum; wc -l <runs", stdin=DATA)
    assert result.stdout.split() == [hashlib.sha256(DATA).hexdigest(), "-", "1"]
    assert len(DATA) // LIFE < proxy.connections < 50


async def test_what_a_process_reads_arrives_although_no_connection_lives_long_enough(up, proxy):
    process = await up.start("sha256sum")
    await process.write(DATA)
    await process.close_stdin()
    assert (
        b"".join([data async for data in process.output()]).split()[0]
        == hashlib.sha256(DATA).hexdigest().encode()
    )
    assert len(DATA) // LIFE < proxy.connections < 50


async def test_the_output_of_a_shell_arrives_although_no_connection_lives_long_enough(down, proxy):
    shell = down.shell()
    result = await shell.run(f"echo once >>runs; {SAY[2].partition(';')[2]}")
    assert result.output.text.replace("\r\n", "\n").count("a") == 600_000
    assert result.output.text.split()[-1] == "1"
    assert len(SAID) // LIFE < proxy.connections < 50


async def test_long_lists_arrive_although_no_connection_lives_long_enough(running_server, proxy):
    async with cut_again_and_again(running_server, proxy, "down") as workspace:
        proxy.cuts.clear()
        proxy.cut()
        conversation = Conversation(Agent(llm=ScriptedLLM([say("x" * 10_000)], repeat=True)), workspace)
        await workspace.execute("mkdir many; cd many; seq -f file-%g 2000 | xargs touch")
        for _ in range(20):
            await conversation.send_message("y" * 10_000)
            await conversation.run()
        proxy.cuts += [("down", LIFE)] * 100
        proxy.cut()
        assert len(await workspace.files.list("many")) == 2000
        seqs = [event.seq async for event in conversation.events()]
        assert seqs == list(range(1, seqs[-1] + 1))
        assert 3 < proxy.connections < 50
