"""The byte streams of a call: taken up before anything begins, and always ended, by a box and by a server."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent_sdk import LocalWorkspace
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import InvalidParams, PathNotFound
from agent_sdk.protocol.methods.workspace import (
    Describe,
    Download,
    Execute,
    FilesMkdir,
    ProcessInput,
    ProcessOutput,
    ProcessStart,
    ProcessWait,
    ShellRun,
    ShellSend,
    Upload,
)
from agent_sdk.remote.connection import connect
from agent_sdk.rpc.peer import Peer
from agent_sdk.rpc.pipe import memory_pipes
from agent_sdk.workspace.service import workspace_handlers

THEIRS = 1 << 20  # even: the opener of a connection numbers odd


@pytest.fixture(params=["box", "server"])
async def peer(request, server, tmp_path):
    async with AsyncExitStack() as stack:
        if request.param == "server":
            yield (await stack.enter_async_context(connect(server.url, server.key))).peer
            return
        (tmp_path / "root").mkdir()
        here, there = memory_pipes()
        local = await stack.enter_async_context(LocalWorkspace(tmp_path / "root"))
        handlers = workspace_handlers(local)
        await stack.enter_async_context(Peer(there, handlers, opener=False, strict=True))
        yield await stack.enter_async_context(Peer(here, opener=True))


@pytest.fixture
async def root(peer) -> Path:
    return Path((await peer.call(Describe())).root)


def op(cls, **fields):
    return cls(op_id=new_id(), **fields)


NUMBERED = {
    "execute, stdout": (op(Execute, shell="echo run >>ran"), "stdout"),
    "execute, stderr": (op(Execute, shell="echo run >>ran"), "stderr"),
    "execute and follow": (op(Execute, shell="echo run >>ran", follow=True), "stdout"),
    "execute and read": (op(Execute, shell="cat >>ran"), "stdin"),
    "shell.run": (op(ShellRun, command="echo run >>ran"), "channel"),
    "shell.send": (op(ShellSend, keys="\r"), "channel"),
    "upload": (op(Upload, path="ran", channel=THEIRS), "channel"),
}


@pytest.mark.parametrize("name", NUMBERED)
async def test_a_call_with_a_number_that_is_no_stream_has_not_run_and_may_come_again(peer, root, name):
    given, field = NUMBERED[name]
    call = replace(given, op_id=new_id())
    if isinstance(call, ShellSend):
        await peer.call(op(ShellRun, command="read; echo run >>ran", quiet_ms=1))
    for number in (THEIRS, 2):
        with pytest.raises(InvalidParams, match="just opened"):
            await peer.call(replace(call, **{field: number}))
    assert not (root / "ran").exists()
    async with AsyncExitStack() as stack:
        if field == "stdin" or isinstance(call, Upload):
            writer = await stack.enter_async_context(peer.open_writer())
            calling = asyncio.ensure_future(peer.call(replace(call, **{field: writer.channel})))
            await writer.write(b"run\n")
            await writer.finish(hashlib.sha256(b"run\n").digest())
            await calling
        else:
            reader = await stack.enter_async_context(peer.open_reader())
            await peer.call(replace(call, **{field: reader.channel}))
    assert (root / "ran").read_text() == "run\n"


async def test_two_streams_of_a_call_cannot_have_the_same_number(peer, root):
    async with peer.open_reader() as reader:
        with pytest.raises(InvalidParams):
            await peer.call(op(Execute, shell="touch ran", stdout=reader.channel, stderr=reader.channel))
    assert not (root / "ran").exists()


async def test_a_command_that_was_refused_for_its_folder_may_come_again_when_there_is_one(peer):
    call = op(ProcessStart, argv=["pwd"], cwd="folder")
    for _ in range(2):
        with pytest.raises(PathNotFound):
            await peer.call(call)
    await peer.call(op(FilesMkdir, path="folder"))
    assert (await peer.call(call)).process_id


QUIET = {
    "execute": (op(Execute, shell="true"), ("stdout", "stderr")),
    "execute, one of two": (op(Execute, shell="echo said >&2"), ("stdout", "stderr")),
    "execute and follow": (op(Execute, shell="true", follow=True), ("stdout", "stderr")),
    "execute, not to be started": (op(Execute, argv=["/nowhere"]), ("stdout", "stderr")),
    "execute, its box lost": (op(Execute, shell="kill -9 $PPID; sleep 9"), ("stdout", "stderr")),
    "shell.send": (op(ShellSend, quiet_ms=50), ("channel",)),
    "process.output": (ProcessOutput(process_id="?", channel=1), ("channel",)),
    "download": (Download(path="empty", channel=1), ("channel",)),
}


@pytest.mark.parametrize("name", QUIET)
async def test_a_stream_that_carried_nothing_is_ended_all_the_same_whenever_it_is_asked_for(
    request, peer, root, name
):
    call, fields = QUIET[name]
    if name.endswith("lost") and "server" not in request.node.callspec.id:
        pytest.skip("there is nobody left who could end it")
    if isinstance(call, ProcessOutput):
        started = await peer.call(op(ProcessStart, argv=["true"]))
        call = replace(call, process_id=started.process_id)
    elif isinstance(call, Download):
        (root / "empty").touch()
    else:
        call = replace(call, op_id=new_id())
    for _ in range(2):
        async with AsyncExitStack() as stack:
            readers = {name: await stack.enter_async_context(peer.open_reader()) for name in fields}
            numbers = {name: reader.channel for name, reader in readers.items()}
            _, *said = await asyncio.gather(
                peer.call(replace(call, **numbers)),
                *(reader.read_all(1 << 16) for reader in readers.values()),
            )
            assert set(said) <= {b"", b"said\n"}
            assert all(reader.over for reader in readers.values())


@pytest.mark.parametrize("since", [2, 3, 9])
@pytest.mark.parametrize("follow", [True, False])
async def test_output_is_answered_with_its_size_however_much_of_it_the_caller_has(peer, since, follow):
    process = (await peer.call(op(ProcessStart, argv=["printf", "abc"]))).process_id
    await peer.call(ProcessWait(process_id=process))
    async with peer.open_reader() as reader:
        call = ProcessOutput(process_id=process, channel=reader.channel, since=since, follow=follow)
        assert (await peer.call(call)).bytes == 3
        assert [chunk async for chunk in reader] == ([(2, b"c")] if since == 2 else [])
        assert reader.size == 3


async def test_a_caller_who_wants_no_output_any_more_gets_the_answer_all_the_same(peer):
    command = "head -c 9M /dev/zero; head -c 9M /dev/zero >&2"
    async with AsyncExitStack() as both:
        out = await both.enter_async_context(peer.open_reader())
        err = await both.enter_async_context(peer.open_reader())
        call = op(Execute, shell=command, stdout=out.channel, stderr=err.channel)
        calling = asyncio.ensure_future(peer.call(call))
        await anext(out)
        await both.aclose()
        assert (await calling).stderr_bytes == 9 << 20


async def test_input_for_a_process_goes_over_a_stream_of_its_own(peer):
    started = await peer.call(op(ProcessStart, argv=["cat"]))
    with pytest.raises(InvalidParams, match="just opened"):
        await peer.call(ProcessInput(process_id=started.process_id, channel=THEIRS))
