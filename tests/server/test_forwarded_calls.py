"""Calls to a box through a server: once each, whatever is killed meanwhile, with all their bytes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import msgspec
import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import Cancelled, OpMismatch, PathNotFound, TransferBroken
from agent_sdk.protocol.methods.conversation import GetEvents, GetState, SetTitle
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.methods.workspace import (
    Describe,
    Execute,
    Executed,
    FilesMkdir,
    FilesRemove,
    FilesStat,
    ShellReset,
    ShellRun,
    Upload,
)
from agent_sdk.protocol.results import RunningOperation, Transferred
from agent_sdk.remote.connection import connect
from agent_sdk.rpc.peer import Peer
from tests.server.test_box_process import gone


class Server:
    """A server process that can be killed, and its successors on the same data folder."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.environment = {"AGENT_SERVER_DRAIN_SECONDS": "1", "AGENT_SERVER_BOX_LINGER_SECONDS": "120"}
        self.conversation = new_id()
        self._process: asyncio.subprocess.Process | None = None
        self._url = self._key = ""

    async def start(self) -> None:
        command = ("-m", "agent_server", "serve", "--json", "--port", "0", "--data", str(self.data))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **self.environment},
        )
        ready = json.loads(await self._process.stdout.readline())
        self._url, self._key = ready["url"], Path(ready["api_key_file"]).read_text().strip()

    async def stop(self, number: int) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)
        await self._process.wait()

    async def restart(self, number: int = signal.SIGKILL) -> None:
        await self.stop(number)
        await self.start()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Peer]:
        """A connection that is lost with its server, and does not come back by itself."""
        async with connect(self._url, self._key, conversation=self.conversation) as connection:
            yield connection.peer

    async def metric(self, name: str, value: int) -> bool:
        """Wait until this number of the server has this value."""
        async with aiohttp.ClientSession(self._url, headers={"Authorization": f"Bearer {self._key}"}) as http:
            while f"\nagent_server_{name} {value}.0\n" not in await (await http.get("/metrics")).text():
                pass
        return True

    async def root(self) -> Path:
        async with self.connected() as peer:
            return Path((await peer.call(Describe())).root)


@pytest.fixture
async def server(tmp_path):
    running = Server(tmp_path / "data")
    await running.start()
    async with connect(running._url, running._key) as connection:
        running.conversation = connection.answer.conversation
        await connection.peer.call(SetTitle(op_id=new_id(), title="kept"))  # what was only looked at would go
    yield running
    running.environment["AGENT_SERVER_BOXES_ON_STOP"] = "end"
    await running.restart()
    await running.stop(signal.SIGTERM)


async def execute(peer: Peer, call: Execute) -> tuple[Executed, bytes, bytes]:
    """Make the call with streams of its own; returns the answer and what came over them."""
    async with AsyncExitStack() as stack:
        out, err = [await stack.enter_async_context(peer.open_reader()) for _ in range(2)]
        fields = {name: getattr(call, name) for name in call.__struct_fields__}
        follow = Execute(**{**fields, "stdout": out.channel, "stderr": err.channel, "follow": True})
        answer, said, complaint = await asyncio.gather(peer.call(follow), received(out), received(err))
        return answer, said, complaint


async def upload(peer: Peer, fields: dict, data: bytes, trailer: bytes | None = None) -> Transferred:
    """Send a file, with the digest of its bytes or with this `trailer`."""
    async with peer.open_writer() as writer:
        calling = asyncio.ensure_future(peer.call(Upload(**fields, channel=writer.channel)))
        with suppress(TransferBroken):  # the answer is known already, and the bytes are not wanted again
            await writer.write(data)
            await writer.finish(hashlib.sha256(data).digest() if trailer is None else trailer)
        return await calling


async def received(reader) -> bytes:
    return b"".join([chunk.data async for chunk in reader])


LINES = "".join(f"{number}\n" for number in range(1, 21)).encode()


async def test_a_command_goes_on_while_its_server_is_dead_and_its_end_is_told_by_the_next_one(server):
    root = await server.root()
    command = "echo run >>runs; for i in $(seq 20); do echo $i; sleep 0.05; done; exit 3"
    call = Execute(op_id=new_id(), shell=command)
    async with server.connected() as peer, peer.open_reader() as out, peer.open_reader() as err:
        fields = {"stdout": out.channel, "stderr": err.channel, "follow": True}
        calling = asyncio.ensure_future(peer.call(Execute(op_id=call.op_id, shell=command, **fields)))
        assert (await anext(out)).data.startswith(b"1\n")
        await server.restart()
        with pytest.raises(ConnectionError):
            await calling
    async with server.connected() as peer:
        answer, said, _ = await execute(peer, call)
        assert (answer.status, answer.exit_code, said) == ("exited", 3, LINES)
        assert await execute(peer, call) == (answer, said, b"")
    assert (root / "runs").read_text() == "run\n"


async def test_a_command_whose_output_nobody_followed_is_attached_to_as_well(server):
    root = await server.root()
    call = Execute(op_id=new_id(), shell="echo run >>runs; echo begun >pipe; read x <pipe; echo $x")
    os.mkfifo(root / "pipe")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        assert await asyncio.to_thread((root / "pipe").read_text) == "begun\n"
        await server.restart()
        with pytest.raises(ConnectionError):
            await calling
    async with server.connected() as peer:
        again = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").write_text, "over\n")
        answer = await again
        assert (answer.status, answer.exit_code, answer.stdout_text) == ("exited", 0, "over\n")
    assert (root / "runs").read_text() == "run\n"


async def test_what_a_command_says_while_its_server_is_dead_is_all_there(server):
    root = await server.root()
    os.mkfifo(root / "go")
    os.mkfifo(root / "begun")
    call = Execute(
        op_id=new_id(), shell="echo >begun; read x <go; head -c 5242880 /dev/zero | tr '\\0' x; echo end >&2"
    )
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "begun").read_text)
        await server.stop(signal.SIGKILL)
        with pytest.raises(ConnectionError):
            await calling
    await asyncio.to_thread((root / "go").write_text, "go\n")
    await server.start()
    async with server.connected() as peer:
        answer, said, complaint = await execute(peer, call)
        assert (answer.exit_code, answer.stdout_bytes, len(said)) == (0, 5 << 20, 5 << 20)
        assert (said, complaint) == (b"x" * (5 << 20), b"end\n")
        rest = await execute(peer, msgspec.structs.replace(call, stdout_since=(5 << 20) - 3))
        assert (rest[0].stdout_bytes, rest[1]) == (5 << 20, b"xxx")


async def test_what_had_begun_in_a_box_that_was_killed_is_unknown_and_the_next_call_works(server):
    root = await server.root()
    call = Execute(op_id=new_id(), shell="echo run >>runs; kill -9 $PPID; sleep 600")
    async with server.connected() as peer:
        first = await peer.call(call)
        assert (first.status, first.exit_code) == ("unknown", None)
        assert "lost" in first.reason
        assert await peer.call(call) == first
        assert await execute(peer, call) == (first, b"", b"")
        assert (await peer.call(Execute(op_id=new_id(), shell="cat runs"))).stdout_text == "run\n"
    await server.restart()
    async with server.connected() as peer:
        assert await peer.call(call) == first
    assert (root / "runs").read_text() == "run\n"


async def test_a_call_that_begun_before_both_server_and_box_died_is_not_run_again(server):
    root = await server.root()
    os.mkfifo(root / "begun")
    shell = ShellRun(
        op_id=new_id(), command="echo run >>runs; cut -d' ' -f4 /proc/$PPID/stat >begun; sleep 600"
    )
    made = FilesMkdir(op_id=new_id(), path="made")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(shell))
        box = int(await asyncio.to_thread((root / "begun").read_text))
        await peer.call(made)
        await server.stop(signal.SIGKILL)
        os.kill(box, signal.SIGKILL)
        with pytest.raises(ConnectionError):
            await calling
    await server.start()
    (root / "made").rmdir()
    async with server.connected() as peer:
        assert (await peer.call(shell)).status == "unknown"
        assert await peer.call(made) == Done()
        with pytest.raises(PathNotFound):
            await peer.call(FilesStat(path="made"))
        events = (await peer.call(GetEvents())).events
        assert b'"workspace_changed"' in b"".join(bytes(event) for event in events)
    assert (root / "runs").read_text() == "run\n"


async def test_an_answer_is_given_again_although_the_box_is_gone_with_up_to_64_kib_of_its_output(server):
    small = Execute(op_id=new_id(), shell="printf out; printf err >&2; exit 4")
    large = Execute(op_id=new_id(), shell="head -c 70000 /dev/zero")
    shell = ShellRun(op_id=new_id(), command="echo shell")
    failed = FilesRemove(op_id=new_id(), path="nothing")
    async with server.connected() as peer:
        answer = await execute(peer, small)
        await execute(peer, large)
        said = await peer.call(shell)
        with pytest.raises(PathNotFound):
            await peer.call(failed)
        await peer.call(ShellReset(op_id=new_id()))
        box = (await peer.call(Describe())).pid
        os.kill(box, signal.SIGKILL)
    await server.restart()
    async with server.connected() as peer:
        assert await execute(peer, small) == answer
        assert (await peer.call(small)).stdout_text == "out"
        assert (await execute(peer, msgspec.structs.replace(small, stdout_since=1)))[1] == b"ut"
        sizes, nothing, _ = await execute(peer, large)
        assert (sizes.stdout_bytes, nothing) == (70_000, b"")
        assert "not kept" in sizes.reason
        assert (await peer.call(shell)).text == said.text == "shell\n"
        with pytest.raises(PathNotFound):
            await peer.call(failed)


async def test_the_same_op_id_with_other_params_is_refused_also_after_a_restart(server):
    call = FilesMkdir(op_id=new_id(), path="one")
    other = FilesMkdir(op_id=call.op_id, path="two")
    async with server.connected() as peer:
        await peer.call(call)
        with pytest.raises(OpMismatch):
            await peer.call(other)
    await server.restart()
    async with server.connected() as peer:
        with pytest.raises(OpMismatch):
            await peer.call(other)


async def test_a_cancelled_call_is_ended_in_the_box_and_not_run_again(server):
    root = await server.root()
    os.mkfifo(root / "begun")
    call = Execute(op_id=new_id(), shell="echo run >>runs; echo $$ >begun; sleep 600")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        pid = int(await asyncio.to_thread((root / "begun").read_text))
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert gone(pid)
        with pytest.raises(Cancelled):
            await peer.call(call)
    assert (root / "runs").read_text() == "run\n"


async def test_a_call_whose_caller_is_gone_goes_on_and_is_told_among_what_runs(server):
    root = await server.root()
    os.mkfifo(root / "pipe")
    call = Execute(op_id=new_id(), shell="echo begun >pipe; read x <pipe; echo $x")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").read_text)
    with pytest.raises(ConnectionError):
        await calling
    async with server.connected() as peer:
        state = await peer.call(GetState())
        assert state.operations == (RunningOperation(op_id=call.op_id, method="execute"),)
        again = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").write_text, "over\n")
        assert (await again).stdout_text == "over\n"
        assert (await peer.call(GetState())).operations == ()


async def test_what_a_former_server_began_is_told_and_kept_although_nobody_repeats_it(server):
    root = await server.root()
    os.mkfifo(root / "pipe")
    call = Execute(op_id=new_id(), shell="echo run >>runs; echo begun >pipe; read x <pipe; echo $x")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").read_text)
        server.environment["AGENT_SERVER_IDLE_SECONDS"] = "0"
        await server.restart()
        with pytest.raises(ConnectionError):
            await calling
    told = (RunningOperation(op_id=call.op_id, method="execute"),)
    async with server.connected() as peer:
        assert (await peer.call(GetState())).operations == told
    await server.metric("conversations", 0)
    assert await server.metric("boxes", 1)
    async with server.connected() as peer:
        assert (await peer.call(GetState())).operations == told
        again = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").write_text, "over\n")
        assert (await again).stdout_text == "over\n"
        assert (await peer.call(GetState())).operations == ()
    await server.metric("boxes", 0)
    assert (root / "runs").read_text() == "run\n"


async def test_what_ended_while_its_server_was_dead_is_not_told_among_what_runs_and_still_answered(server):
    root = await server.root()
    os.mkfifo(root / "pipe")
    call = Execute(op_id=new_id(), shell="echo begun >pipe; read x <pipe; echo $x")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").read_text)
        await server.restart()
        with pytest.raises(ConnectionError):
            await calling
    await asyncio.to_thread((root / "pipe").write_text, "over\n")
    async with server.connected() as peer:
        while (await peer.call(GetState())).operations:
            pass
        assert (await peer.call(call)).stdout_text == "over\n"


async def test_what_failed_but_may_come_again_is_owed_to_nobody(server):
    call = {"op_id": new_id(), "path": "file", "size": 4}
    async with server.connected() as peer:
        with pytest.raises(TransferBroken):
            await upload(peer, call, b"data", b"another digest")
        assert (await upload(peer, call, b"data")).size == 4
        with pytest.raises(TransferBroken):
            await upload(peer, {**call, "op_id": new_id()}, b"data", b"another digest")
    await server.stop(signal.SIGTERM)
    assert list((server.data / "boxes").iterdir()) == []
    await server.start()


async def test_a_command_goes_on_when_its_server_is_stopped_properly(server):
    root = await server.root()
    os.mkfifo(root / "pipe")
    call = Execute(op_id=new_id(), shell="echo run >>runs; echo begun >pipe; read x <pipe; echo $x")
    async with server.connected() as peer:
        calling = asyncio.ensure_future(peer.call(call))
        await asyncio.to_thread((root / "pipe").read_text)
        await server.stop(signal.SIGTERM)
        with pytest.raises(ConnectionError):
            await calling
    await asyncio.to_thread((root / "pipe").write_text, "over\n")
    await server.start()
    async with server.connected() as peer:
        assert (await peer.call(call)).stdout_text == "over\n"
    assert (root / "runs").read_text() == "run\n"


async def test_a_repeated_upload_takes_the_place_of_the_one_that_broke_off(server):
    data = os.urandom(3 << 20)
    fields = {"op_id": new_id(), "path": "file", "size": len(data)}
    async with server.connected() as stuck, server.connected() as peer, stuck.open_writer() as writer:
        calling = asyncio.ensure_future(stuck.call(Upload(**fields, channel=writer.channel)))
        await writer.write(data[: 2 << 20])
        done = await upload(peer, fields, data)
        with pytest.raises(Cancelled):
            await calling
        assert done.sha256 == hashlib.sha256(data).hexdigest()
        assert await upload(peer, fields, data) == done
    assert (await server.root() / "file").read_bytes() == data


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_one_stream_can_be_followed_without_the_other(server, stream, tmp_path):
    go = tmp_path / "go"
    os.mkfifo(go)
    redirected = {"stdout": "", "stderr": " >&2"}[stream]
    command = f"echo first{redirected}; read line <{go}; echo last{redirected}"
    async with server.connected() as peer, peer.open_reader() as reader:
        call = Execute(op_id=new_id(), shell=command, follow=True, **{stream: reader.channel})
        calling = asyncio.ensure_future(peer.call(call))
        assert (await anext(reader)).data == b"first\n"
        await asyncio.to_thread(go.write_text, "on\n")
        assert await received(reader) == b"last\n"
        answer = await calling
    assert (answer.exit_code, getattr(answer, f"{stream}_bytes")) == (0, 11)
