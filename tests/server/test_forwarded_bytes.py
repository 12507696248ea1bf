"""The bytes of calls to a box: each once and in order, wherever a stream of them is taken up again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import apsw
import pytest

from agent_sdk import RemoteWorkspace
from agent_sdk.ids import new_id
from agent_sdk.log.event_log import EventLog
from agent_sdk.log.operations import KEPT, KEPT_SECONDS
from agent_sdk.protocol.errors import InvalidParams, OpExpired, WorkspaceUnavailable
from agent_sdk.protocol.methods.connection import Ping
from agent_sdk.protocol.methods.workspace import (
    WORKSPACE,
    Describe,
    Execute,
    Executed,
    FilesMkdir,
    ProcessInput,
    ProcessOutput,
    ProcessStart,
)
from agent_sdk.protocol.specs import Limits
from agent_sdk.remote.connection import connect
from agent_sdk.rpc.peer import Inbound, Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.rpc.stream import ByteWriter
from agent_server.boxes.forwarded_call import ForwardedCall
from agent_server.boxes.forwarding import ForwardedCalls
from agent_server.boxes.link import BoxLink
from agent_server.boxes.name import BoxName
from tests.server.test_box_process import ENVIRONMENT
from workspaces.box.process import BoxProcess


class Place:
    """A conversation on a server, for raw calls over connections that do not come back."""

    def __init__(self, url: str, key: str, conversation: str, root: Path) -> None:
        self._where = (url, key)
        self._conversation = conversation
        self.root = root

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Peer]:
        async with connect(*self._where, conversation=self._conversation) as connection:
            yield connection.peer

    def pipe(self, name: str) -> Path:
        os.mkfifo(self.root / name)
        return self.root / name


@pytest.fixture
async def place(server):
    async with connect(server.url, server.key) as connection:
        root = Path((await connection.peer.call(Describe())).root)
        yield Place(server.url, server.key, connection.answer.conversation, root)


async def run(peer: Peer, *, stdin: bytes | None = None, **fields) -> tuple[Executed, bytes]:
    """Execute, with what it says on standard output. An empty `stdin` is announced and never sent."""
    async with AsyncExitStack() as stack:
        out, err = [await stack.enter_async_context(peer.open_reader()) for _ in range(2)]
        if stdin is not None:
            writer = await stack.enter_async_context(peer.open_writer())
            fields["stdin"] = writer.channel
        call = Execute(stdout=out.channel, stderr=err.channel, follow=True, **fields)
        calling = asyncio.ensure_future(peer.call(call))
        if stdin:
            await writer.write(stdin)
            await writer.finish()
        said = b"".join([chunk.data async for chunk in out])
        return await calling, said


async def feed(peer: Peer, process_id: str, since: int, data: bytes) -> int:
    async with peer.open_writer() as writer:
        call = ProcessInput(process_id=process_id, since=since, channel=writer.channel)
        calling = asyncio.ensure_future(peer.call(call))
        await writer.write(data)
        await writer.finish()
        return (await calling).bytes


async def said(peer: Peer, process_id: str, until: int) -> bytes:
    """What a process has said, as soon as it is so much."""
    got = b""
    async with peer.open_reader() as reader:
        calling = asyncio.ensure_future(
            peer.call(ProcessOutput(process_id=process_id, channel=reader.channel))
        )
        async for chunk in reader:
            got += chunk.data
            if len(got) >= until:
                break
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    return got


# --- input ---


async def test_input_goes_on_where_it_broke_off_and_what_came_before_is_skipped(place):
    async with place.connected() as first:
        process = (await first.call(ProcessStart(op_id=new_id(), argv=["cat"]))).process_id
        async with first.open_writer() as writer:
            call = ProcessInput(process_id=process, channel=writer.channel)
            calling = asyncio.ensure_future(first.call(call))
            await writer.write(b"abc")
            assert await said(first, process, 3) == b"abc"
            await first.close()
        await asyncio.gather(calling, return_exceptions=True)
    async with place.connected() as second:
        with pytest.raises(InvalidParams, match="since"):
            await feed(second, process, 10, b"far away")
        await feed(second, process, 1, b"bcdef")
        assert await said(second, process, 6) == b"abcdef"


async def test_input_that_comes_again_with_a_command_is_ignored(place):
    op_id, command = new_id(), "cat; echo read >begun; read x <go; echo $x"
    begun, go = place.pipe("begun"), place.pipe("go")
    async with place.connected() as peer:
        first = asyncio.ensure_future(run(peer, op_id=op_id, shell=command, stdin=b"one\n"))
        await asyncio.to_thread(begun.read_text)
        running = [
            asyncio.ensure_future(run(peer, op_id=op_id, shell=command, stdin=data))
            for data in (b"two\n", b"")
        ]
        await peer.call(Describe())
        await asyncio.to_thread(go.write_text, "over\n")
        answer, output = await first
        assert (answer.exit_code, output) == (0, b"one\nover\n")
        assert [await each for each in running] == [(answer, output)] * 2
        assert await run(peer, op_id=op_id, shell=command, stdin=b"three\n") == (answer, output)


# --- output ---


async def test_output_is_told_from_where_the_caller_has_it_while_the_command_runs_and_after_it(place):
    call = {"op_id": new_id(), "shell": "echo 12345; echo >begun; read x <go; echo $x"}
    begun, go = place.pipe("begun"), place.pipe("go")
    async with place.connected() as peer:
        first = asyncio.ensure_future(run(peer, **call))
        await asyncio.to_thread(begun.read_text)
        attached = [asyncio.ensure_future(run(peer, **call, stdout_since=since)) for since in (2, 6, 7)]
        await peer.call(Describe())
        await asyncio.to_thread(go.write_text, "over\n")
        answer, output = await first
        assert (output, answer.stdout_bytes) == (b"12345\nover\n", 11)
        assert [await each for each in attached] == [(answer, output[since:]) for since in (2, 6, 7)]
        for since in (0, 3, 11):
            assert await run(peer, **call, stdout_since=since) == (answer, output[since:])


async def test_output_that_was_heard_before_the_box_was_killed_is_there_and_the_rest_is_unknown(
    server, place
):
    heard = asyncio.Event()
    got = []

    def hear(name, data):
        got.append((name, data))
        heard.set()

    async with RemoteWorkspace(server.url, server.key) as workspace:
        command = "echo heard; sleep 600"
        running = asyncio.ensure_future(workspace.execute(command, on_output=hear))
        await heard.wait()
        pid = (await workspace.describe()).pid
        os.kill(pid, 9)
        result = await running
        assert (result.status, result.exit_code, got) == ("unknown", None, [("stdout", b"heard\n")])
        assert (result.stdout, result.out.size, result.err.size) == ("heard\n", 6, 0)
        assert "lost" in result.reason
        assert (await workspace.execute("echo next", on_output=hear)).stdout == "next\n"


# --- forwarded calls by themselves ---


@asynccontextmanager
async def forwarding(
    folder: Path, log: EventLog, patience: float = 5.0
) -> AsyncIterator[tuple[Peer, BoxLink]]:
    """A caller of a conversation, and its way to a box."""
    root = folder / "root"
    root.mkdir(exist_ok=True)

    def make(instance: str) -> BoxProcess:
        return BoxProcess(root, folder / "box", environment=ENVIRONMENT, instance=instance)

    link = BoxLink(make, lambda change, words: None, BoxName(folder / "name"), patience=patience)
    forwarded = ForwardedCalls("c", link, log)
    here, there = memory_pipes()
    try:
        async with (
            Peer(there, dict.fromkeys(WORKSPACE, forwarded.answer), opener=False, strict=True),
            Peer(here, {}, opener=True, strict=False) as caller,
        ):
            yield caller, link
        await forwarded.close()
    finally:
        await link.close()


@pytest.fixture
async def log(tmp_path):
    async with EventLog.open(tmp_path / "log.db") as log:
        await log.create("c")
        yield log


async def test_a_command_does_not_notice_that_the_connection_to_its_box_broke(log, tmp_path):
    async with forwarding(tmp_path, log) as (caller, link):
        root = Path((await caller.call(Describe())).root)
        for name in ("begun", "go"):
            os.mkfifo(root / name)
        command = "echo run >>runs; echo before; echo >begun; read x <go; echo $x"
        running = asyncio.ensure_future(run(caller, op_id=new_id(), shell=command))
        await asyncio.to_thread((root / "begun").read_text)
        first = await link.linked()
        await first.peer.close()
        second = await link.linked()
        assert second.peer is not first.peer
        await asyncio.to_thread((root / "go").write_text, "after\n")
        answer, output = await running
        assert (answer.status, answer.exit_code, output) == ("exited", 0, b"before\nafter\n")
        assert (root / "runs").read_text() == "run\n"


async def test_a_command_of_a_box_that_was_stopped_is_told_in_time_and_answered_when_it_is_repeated(
    log, tmp_path
):
    async with forwarding(tmp_path, log, patience=0.5) as (caller, link):
        info = await caller.call(Describe())
        os.kill(info.pid, signal.SIGSTOP)
        call = Execute(op_id=new_id(), shell="echo run >>runs", timeout_ms=100)
        with pytest.raises(WorkspaceUnavailable, match="does not answer"):
            await caller.call(call)
        assert [known.op_id for known in await log.operations("c").begun()] == [call.op_id]
        os.kill(info.pid, signal.SIGCONT)
        assert (await caller.call(call)).status == "exited"
        assert (Path(info.root) / "runs").read_text() == "run\n"


async def test_output_that_comes_after_the_answer_passes_once_to_a_caller_who_reads_slowly():
    told, window = asyncio.Event(), Limits(window_bytes=6000)
    whole = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))
    saying: list[asyncio.Task[None]] = []

    async def say(writer: ByteWriter) -> None:
        async with writer:
            await told.wait()
            await writer.write(whole)
            await writer.finish()

    async def box(params: Execute, call: Inbound) -> Executed:
        saying.append(asyncio.create_task(say(call.writing(params.stdout))))
        return Executed(status="exited", exit_code=0, stdout_bytes=len(whole))

    async def forward(params: Execute, call: Inbound) -> Executed:
        async with ForwardedCall(params, call) as forwarded:
            asked = asyncio.ensure_future(forwarded.through(linked))
            await linked.call(Ping())  # the box has answered
            told.set()
            return await asked

    (here, there), (outside, inside) = memory_pipes(), memory_pipes()
    async with (
        Peer(there, {Execute: box}, opener=False),
        Peer(here, opener=True) as linked,
        Peer(inside, {Execute: forward}, opener=False) as server,
        Peer(outside, opener=True, limits=window) as caller,
        caller.open_reader() as reader,
    ):
        server.other_limits = window
        calling = asyncio.ensure_future(
            caller.call(Execute(op_id=new_id(), shell="?", stdout=reader.channel))
        )
        assert await reader.read_all(len(whole)) == whole
        assert (await calling).stdout_bytes == len(whole)
        await asyncio.gather(*saying)


async def test_a_call_whose_answer_is_not_kept_any_more_is_refused_and_not_sent(tmp_path):
    file = tmp_path / "log.db"
    calls = [FilesMkdir(op_id=new_id(), path=f"made/{number}") for number in range(3)]

    def change(statement: str) -> None:
        with apsw.Connection(str(file)) as connection:
            connection.execute(statement)
        connection.close()

    async with EventLog.open(file) as log:
        await log.create("c")
        async with forwarding(tmp_path, log) as (caller, _):
            await caller.call(calls[0])
    change(f"UPDATE clock SET seconds = {KEPT_SECONDS + 1}")
    for call in calls[1:]:
        async with EventLog.open(file) as log, forwarding(tmp_path, log) as (caller, _):
            await caller.call(call)
        change(f"UPDATE operations SET nth = nth + {KEPT} WHERE op_id = '{call.op_id}'")
    (tmp_path / "root/made/0").rmdir()
    async with EventLog.open(file) as log, forwarding(tmp_path, log) as (caller, _):
        with pytest.raises(OpExpired):
            await caller.call(calls[0])
        assert not (tmp_path / "root/made/0").exists()
