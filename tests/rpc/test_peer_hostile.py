"""Whatever a client sends, the peer answers on or says why it hangs up; it never breaks."""

import asyncio
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_sdk.protocol.codec import MESSAGES
from agent_sdk.protocol.errors import ConnectionLost
from agent_sdk.protocol.frame import _head
from agent_sdk.protocol.methods.method import Done
from agent_sdk.protocol.methods.workspace import Count, Download, FilesMkdir, GitDiff, ProcessInput
from agent_sdk.protocol.results import Transferred
from tests.rpc.links import SMALL, raw_to_peer

CODES = {4400, 4413}


async def read(params, call):
    async with call.reading(params.channel) as reader:
        return Count(sum([len(chunk.data) async for chunk in reader]))


async def write(params, call):
    async with call.writing(params.channel) as writer:
        await writer.write(bytes(300_000))
        await writer.finish()
    return Transferred(300_000, "")


async def wait(params, call):
    await asyncio.Event().wait()


async def mkdir(params, call):
    return Done()


HANDLERS = {ProcessInput: read, Download: write, GitDiff: wait, FilesMkdir: mkdir}

numbers = st.integers(0, 8)
params = st.one_of(
    st.builds(lambda n: {"process_id": "p", "channel": n}, numbers),
    st.builds(lambda n: {"path": "x", "channel": n}, numbers),
    st.builds(lambda n: {"id": n}, numbers),
    st.just({"path": "x", "op_id": "018f0000-0000-7000-8000-000000000001"}),
    st.just({}),
    st.just([1]),
)
methods = st.sampled_from(
    ["process.input", "download", "git.diff", "files.mkdir", "call.cancel", "$/cancelRequest", "x"]
)
texts = st.one_of(
    st.builds(
        lambda id, method, params: json.dumps(
            {"jsonrpc": "2.0", **id, "method": method, "params": params}
        ).encode(),
        st.builds(lambda n: {"id": n}, numbers) | st.just({}),
        methods,
        params,
    ),
    st.builds(lambda n: b'{"jsonrpc":"2.0","id":%d,"result":{}}' % n, numbers),
    st.binary(max_size=20),
)
binaries = st.builds(
    lambda kind, flags, stream, offset, payload: _head.pack(1, kind, flags, stream, offset) + payload,
    st.integers(0, 4),
    st.sampled_from([0, 0, 0, 1]),
    st.integers(0, 8) | st.just(MESSAGES),
    st.integers(0, 8) | st.sampled_from([1 << 20, 2**64 - 1]),
    st.sampled_from([b"", b"x", b"{}", bytes(200), bytes(60_000)]),
)
frames = st.lists(st.tuples(texts, st.just(True)) | st.tuples(binaries, st.just(False)), max_size=40)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(frames=frames)
def test_a_peer_survives_whatever_it_is_sent(frames):
    bugs = []
    asyncio.run(asyncio.wait_for(speak(frames, bugs), 30))
    assert not bugs


async def speak(frames, bugs):
    before = asyncio.all_tasks()
    async with raw_to_peer(HANDLERS, limits=SMALL, on_bug=lambda exc, _: bugs.append(exc)) as (raw, _):
        listening = asyncio.create_task(listen(raw))
        try:
            for content, text in frames:
                await raw.pipe.send(content, text=text)
            await raw.call("last", "ping")
        except ConnectionLost:
            pass
        assert await listening in CODES | {"answered"}
    assert asyncio.all_tasks() == before


async def listen(raw):
    """Until the last ping is answered, or the close code."""
    try:
        while True:
            message = await raw.receive()
            if isinstance(message, dict) and message.get("id") == "last":
                return "answered"
    except ConnectionLost as lost:
        return lost.details["close_code"]
