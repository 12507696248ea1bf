"""Byte streams: under credit, beside calls, and over when either side says so."""

import asyncio
import hashlib

import pytest

from agent_sdk.ids import new_id
from agent_sdk.protocol import frame
from agent_sdk.protocol.errors import ConnectionLost, InvalidParams, LimitExceeded, TransferBroken
from agent_sdk.protocol.methods.connection import Ping, Pong, SyncReset
from agent_sdk.protocol.methods.workspace import Count, Download, Execute, Executed, ProcessInput, Upload
from agent_sdk.protocol.results import Transferred
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.stream import FIRST_BYTES
from tests.rpc.links import SMALL, raw_to_peer

pytestmark = pytest.mark.timeout(30)

WINDOW = 64 << 10
BLOCK = bytes(range(256)) * 1024
"""256 KiB in which every byte has a value of its own."""


async def receive_file(params, call):
    async with call.reading(params.channel) as reader:
        digest = hashlib.sha256()
        async for chunk in reader:
            digest.update(chunk.data)
    assert reader.trailer == digest.digest()
    return Transferred(reader.size, digest.hexdigest())


async def send_file(params, call):
    async with call.writing(params.channel) as writer:
        digest = hashlib.sha256()
        for _ in range(20):
            digest.update(BLOCK)
            await writer.write(BLOCK)
        await writer.finish(digest.digest())
    return Transferred(writer.offset, digest.hexdigest())


async def upload(client, blocks):
    async with client.open_writer() as writer:
        calling = asyncio.create_task(client.call(Upload(op_id=new_id(), path="x", channel=writer.channel)))
        digest = hashlib.sha256()
        for _ in range(blocks):
            digest.update(BLOCK)
            await writer.write(BLOCK)
        await writer.finish(digest.digest())
        answer = await calling
    assert answer == Transferred(blocks * len(BLOCK), digest.hexdigest())


async def download(client):
    async with client.open_reader() as reader:
        calling = asyncio.create_task(client.call(Download(path="x", channel=reader.channel)))
        data = await reader.read_all(1 << 30)
        answer = await calling
    assert (answer.size, answer.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert reader.trailer.hex() == answer.sha256


async def test_bytes_go_both_ways_at_the_same_time(peers):
    async with peers({Upload: receive_file, Download: send_file}) as (client, server):
        await asyncio.gather(upload(client, 20), download(client), upload(client, 7), download(client))
        for peer in (client, server):
            assert not peer._streams._open
            assert peer.ignored == {"frame of an unknown stream": 0}


async def test_nothing_but_the_end_may_be_sent(peers):
    async with peers({Upload: receive_file}) as (client, _):
        await upload(client, 0)


async def test_the_opener_numbers_odd_and_the_other_end_even(peers):
    async with (
        peers() as (client, server),
        client.open_reader() as one,
        client.open_writer() as three,
        server.open_writer() as two,
    ):
        assert (one.channel, two.channel, three.channel) == (1, 2, 3)


async def test_the_accepting_end_may_open_streams_too(peers):
    async with peers(own={"handlers": {Upload: receive_file}}) as (_, server):
        await upload(server, 3)


async def test_a_reader_that_does_not_read_stops_its_writer_and_nobody_else(peers):
    taken_up, go_on = asyncio.Event(), asyncio.Event()
    held = 0

    async def stalled(params, call):
        nonlocal held
        async with call.reading(params.channel) as reader:
            taken_up.set()
            await go_on.wait()
            held = reader.window.held
            return Count(len(await reader.read_all(1 << 30)))

    async with peers({ProcessInput: stalled, Upload: receive_file}, limits=SMALL) as (client, _):
        client.other_limits = SMALL
        async with client.open_writer() as writer:
            calling = asyncio.create_task(client.call(ProcessInput(process_id="p", channel=writer.channel)))
            writing = asyncio.create_task(writer.write(BLOCK))
            await taken_up.wait()
            await upload(client, 8)
            for _ in range(100):
                assert await client.call(Ping()) == Pong()
            assert not writing.done()
            go_on.set()
            await writing
            await writer.finish()
            assert await calling == Count(len(BLOCK))
    assert held == WINDOW


async def test_a_stream_that_begins_before_its_handler_loses_nothing(peers):
    async with peers({ProcessInput: read_numbers}) as (client, _), client.open_writer() as writer:
        await writer.write(b"early")
        await writer.finish()
        await client.call(Ping())
        assert await client.call(ProcessInput(process_id="p", channel=writer.channel)) == Count(5)


async def read_numbers(params, call):
    async with call.reading(params.channel) as reader:
        return Count(len(await reader.read_all(1 << 20)))


async def test_bytes_may_be_left_out(peers):
    async def with_a_gap(params, call):
        async with call.writing(params.channel) as writer:
            await writer.write(b"head")
            await writer.write_at(5 << 30, b"tail")
            await writer.write_at(4, b"gap")
            await writer.finish(size=6 << 30)
        return Transferred(writer.offset, "")

    async with peers({Download: with_a_gap}) as (client, _):
        async with client.open_reader() as reader:
            await client.call(Download(path="x", channel=reader.channel))
            assert [chunk async for chunk in reader] == [(0, b"head"), (5 << 30, b"tail")]
            assert reader.size == 6 << 30
        async with client.open_reader() as reader:
            await client.call(Download(path="x", channel=reader.channel))
            with pytest.raises(TransferBroken, match="missing at 4"):
                await reader.read_all(100)


async def test_of_pieces_at_their_places_only_what_the_reader_has_not_got_is_sent(peers):
    async def pieces(params, call):
        async with call.writing(params.channel, 2) as writer:
            for offset, data in ((0, b"ab"), (1, b"bcd"), (0, b"abcde"), (3, b"de"), (9, b"j"), (7, b"hij")):
                await writer.write_at(offset, data)
            await writer.finish(size=20)
        return Transferred(writer.offset, "")

    async with peers({Download: pieces}) as (client, _), client.open_reader() as reader:
        await client.call(Download(path="x", channel=reader.channel))
        assert [chunk async for chunk in reader] == [(2, b"cd"), (4, b"e"), (9, b"j")]
        assert reader.size == 20


async def test_reading_everything_has_a_limit(peers):
    async with peers({Download: send_file}) as (client, _):
        async with client.open_reader() as reader:
            calling = asyncio.create_task(client.call(Download(path="x", channel=reader.channel)))
            with pytest.raises(LimitExceeded):
                await reader.read_all(1 << 20)
        with pytest.raises(TransferBroken, match="the reader stopped"):
            await calling


async def test_a_reader_that_leaves_early_stops_the_writer(peers):
    async def read_a_little(params, call):
        async with call.reading(params.channel) as reader:
            return Count(len((await anext(reader)).data))

    async with peers({ProcessInput: read_a_little}) as (client, server):
        async with client.open_writer() as writer:
            calling = asyncio.create_task(client.call(ProcessInput(process_id="p", channel=writer.channel)))
            with pytest.raises(TransferBroken, match="the other end gave up: the reader stopped"):
                while True:
                    await writer.write(BLOCK)
            assert await calling == Count(FIRST_BYTES)
        await client.call(Ping())
        assert server.ignored == {"frame of an unknown stream": 0}


async def test_a_writer_that_leaves_early_breaks_the_stream(peers):
    async with peers({Upload: receive_file}) as (client, _):
        async with client.open_writer() as writer:
            calling = asyncio.create_task(
                client.call(Upload(op_id=new_id(), path="x", channel=writer.channel))
            )
            await writer.write(b"half")
        with pytest.raises(TransferBroken, match="the writer stopped"):
            await calling


async def test_a_stream_that_broke_before_it_was_taken_up_is_broken(peers):
    async with peers({Upload: receive_file, Download: send_file}) as (client, _):
        async with client.open_writer() as writer:
            await writer.write(b"half")
        with pytest.raises(TransferBroken):
            await client.call(Upload(op_id=new_id(), path="x", channel=writer.channel))
        async with client.open_reader() as reader:
            pass
        with pytest.raises(TransferBroken):
            await client.call(Download(path="x", channel=reader.channel))


async def test_cancelling_a_call_ends_its_streams(peers):
    ended = asyncio.Event()

    async def endless(params, call):
        async with call.writing(params.channel) as writer:
            try:
                while True:
                    await writer.write(BLOCK)
            finally:
                ended.set()

    async with peers({Download: endless}) as (client, server):
        async with client.open_reader() as reader:
            calling = asyncio.create_task(client.call(Download(path="x", channel=reader.channel)))
            await anext(reader)
            calling.cancel()
            await asyncio.wait({calling})
            assert ended.is_set()
            with pytest.raises(TransferBroken, match="the writer stopped"):
                await reader.read_all(1 << 30)
        assert not server._streams._open


async def test_a_cancelled_read_loses_nothing(peers):
    async with peers({Download: send_file}) as (client, _), client.open_reader() as reader:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(reader)
        calling = asyncio.create_task(client.call(Download(path="x", channel=reader.channel)))
        assert len(await reader.read_all(1 << 30)) == 20 * len(BLOCK)
        await calling


async def test_both_ends_of_a_stream_hear_of_a_lost_connection(peers):
    outcome = asyncio.Future()

    async def stalled(params, call):
        try:
            async with call.writing(params.channel) as writer:
                while True:
                    await writer.write(BLOCK)
        except (ConnectionLost, asyncio.CancelledError) as exc:
            outcome.set_result(type(exc))
            raise

    async with peers({Download: stalled}) as (client, server):
        async with client.open_reader() as reader, client.open_writer() as writer:
            calling = asyncio.create_task(client.call(Download(path="x", channel=reader.channel)))
            await anext(reader)
            await server.close(4503, "stopping")
            for waiting in (calling, reader.read_all(1 << 30), writer.write(b"x"), writer.finish()):
                with pytest.raises(ConnectionLost):
                    await waiting
        with pytest.raises(ConnectionLost):
            async with client.open_reader() as reader:
                await anext(reader)
    assert outcome.result() in (ConnectionLost, asyncio.CancelledError)


async def take_up(params, call):
    async with call.reading(params.channel):
        return Count(0)


@pytest.mark.parametrize("channel", [2, 10])
async def test_a_channel_must_be_one_of_the_callers(peers, channel):
    async with peers({ProcessInput: take_up}) as (client, _):
        with pytest.raises(InvalidParams, match=rf"channel {channel} is not"):
            await client.call(ProcessInput(process_id="p", channel=channel))


async def test_a_channel_serves_one_call_only(peers):
    async with peers({ProcessInput: take_up}) as (client, _):
        await client.call(ProcessInput(process_id="p", channel=1))
        with pytest.raises(InvalidParams, match="channel 1 is not"):
            await client.call(ProcessInput(process_id="p", channel=1))


@pytest.mark.parametrize("size", [1, 300_000])
async def test_what_a_call_is_to_read_waits_for_its_call_however_many_wait_before_it(peers, size):
    async def read(params, call):
        async with call.reading(params.stdin) as reader:
            return Executed(status="exited", stdout_text=(await reader.read_all(100)).decode())

    async def execute(client, nth):
        async with client.open_writer() as writer:
            await writer.write(b"%d" % nth)
            await writer.finish()
            call = Execute(op_id=new_id(), shell="x" * size, stdin=writer.channel)
            assert (await client.call(call)).stdout_text == str(nth)

    async with peers({Execute: read}) as (client, _):
        await asyncio.gather(*(execute(client, nth) for nth in range(100)))


async def test_a_stream_that_is_left_before_its_call_is_on_its_way_is_reset_behind_it(peers):
    async def read(params, call):
        async with call.reading(params.channel) as reader:
            with pytest.raises(TransferBroken, match="the writer stopped"):
                await reader.read_all(100)
        return Count(0)

    async with peers({ProcessInput: read}) as (client, _):
        async with client.open_writer() as writer:
            await writer.write(b"a part")
        assert await client.call(ProcessInput(process_id="p", channel=writer.channel)) == Count(0)


async def test_a_stream_whose_call_is_not_made_breaks(peers):
    async with peers() as (client, _), client.open_writer() as writer:
        await writer.write(b"a part")
        client.other_limits = Limits(message_bytes=1)
        with pytest.raises(LimitExceeded):
            await client.call(ProcessInput(process_id="p", channel=writer.channel))
        with pytest.raises(TransferBroken, match="the call was not made"):
            await writer.finish()


async def test_a_trailer_has_a_limit(peers):
    async with peers() as (client, _), client.open_writer() as writer:
        with pytest.raises(ValueError, match="256"):
            await writer.finish(bytes(257))


async def test_an_end_that_accepts_little_gets_little_at_once():
    async with raw_to_peer({Download: send_file}) as (raw, peer):
        peer.other_limits = Limits(payload_bytes=10_000, frame_bytes=5_000)
        await raw.call(1, "download", path="x", channel=1)
        assert [len(await raw.receive()) - 16 for _ in range(4)] == [4096, 8192, 10_000, 10_000]
        peer.notify(SyncReset(reason="x" * 20_000, epoch="e", from_seq=1))
        pieces = []
        while not pieces or not pieces[-1].last:
            content = frame.unpack(await raw.receive())
            if isinstance(content, frame.Piece):
                pieces.append(content)
        assert max(len(piece.payload) for piece in pieces) == 10_000


async def test_streams_take_turns():
    async with raw_to_peer({Download: send_file}) as (raw, _):
        for channel in (1, 3, 5):
            await raw.call(channel, "download", path="x", channel=channel)
        turns = [frame.unpack(await raw.receive()).stream for _ in range(30)]
        assert all(set(turns[n : n + 3]) == {1, 3, 5} for n in range(6, 30, 3))


async def test_a_stream_waits_for_the_connection_even_when_it_has_credit():
    writers = []

    async def send(params, call):
        async with call.writing(params.channel) as writer:
            writers.append(writer)
            await send_file_to(writer)

    async with raw_to_peer({Download: send}) as (raw, peer):
        peer.other_limits = Limits(window_bytes=1 << 30)
        await raw.call(1, "download", path="x", channel=1)
        await asyncio.wait({asyncio.create_task(peer.wait_closed())}, timeout=0.2)
        assert writers[0].offset < 1 << 20
        await raw.pipe.close()


async def send_file_to(writer):
    for _ in range(100):
        await writer.write(BLOCK)


async def test_limits_that_make_no_sense_are_mended():
    async with raw_to_peer({Download: send_file}) as (raw, peer):
        peer.other_limits = Limits(payload_bytes=-1, window_bytes=-5, calls=0, frame_bytes=0)
        await raw.call(1, "download", path="x", channel=1)
        await raw.call(2, "ping")
        assert (await raw.receive())["id"] == 2
        await raw.send_binary(frame.credit(1, 1))
        assert await raw.receive() == frame.data(1, 0, BLOCK[:1])
        assert peer.other_limits.calls == 1


# -- by hand


async def closes_with(raw, peer, code, *frames):
    for content in frames:
        await raw.send_binary(content)
    lost = await peer.wait_closed()
    assert lost.details["close_code"] == code
    return lost.details["reason"]


async def reading(params, call):
    async with call.reading(params.channel) as reader:
        async for _ in reader:
            await asyncio.Event().wait()
    return Count(0)


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([b""], "16 to"),
        ([b"\x02" + bytes(15)], "unknown version 2"),
        ([b"\x01\x09" + bytes(14)], "unknown kind 9"),
        ([frame.data(1, 0, b"x")[:16]], "without data"),
        ([frame.data(1, 5, b"x"), frame.data(1, 5, b"x")], "went back"),
        ([frame.end(1, 0), frame.data(1, 0, b"x")], "after the end"),
        ([frame.end(1, 0), frame.end(1, 0)], "after the end"),
        ([frame.data(1, 0, bytes(WINDOW)), frame.data(1, WINDOW, b"x")], "more than the credit"),
        ([frame.credit(1, 1)], "the other way"),
    ],
)
async def test_a_frame_that_breaks_the_rules_of_its_stream_ends_the_connection(frames, why):
    async with raw_to_peer({ProcessInput: reading}, limits=SMALL) as (raw, peer):
        await raw.call(1, "process.input", process_id="p", channel=1)
        await raw.call(2, "ping")
        await raw.receive()
        reason = await closes_with(raw, peer, 4400, *frames)
        assert reason.startswith("bad_binary_header")
        assert why in reason


async def test_bytes_against_the_current_end_the_connection():
    async with raw_to_peer({Download: send_file}) as (raw, peer):
        await raw.call(1, "download", path="x", channel=1)
        await raw.receive()
        assert "the other way" in await closes_with(raw, peer, 4400, frame.data(1, 0, b"x"))


async def test_credit_that_is_taken_back_ends_the_connection():
    async with raw_to_peer({Download: send_file}) as (raw, peer):
        await raw.call(1, "download", path="x", channel=1)
        await raw.receive()
        assert "went back" in await closes_with(raw, peer, 4400, frame.credit(1, 5))


async def test_a_writer_sends_no_more_than_its_credit():
    async with raw_to_peer({Download: send_file}) as (raw, peer):
        peer.other_limits = SMALL
        await raw.call(1, "download", path="x", channel=1)
        assert [len(await raw.receive()) - 16 for _ in range(5)] == [4096, 8192, 16384, 32768, 4096]
        await raw.call(2, "ping")
        assert (await raw.receive())["id"] == 2
        await raw.send_binary(frame.credit(1, WINDOW + 10))
        assert await raw.receive() == frame.data(1, WINDOW, BLOCK[WINDOW : WINDOW + 10])


async def test_credit_that_comes_before_the_writer_counts():
    async with raw_to_peer({Download: send_file}) as (raw, peer):
        peer.other_limits = SMALL
        await raw.send_binary(frame.credit(1, 20 * len(BLOCK)))
        await raw.call(1, "download", path="x", channel=1)
        got = [await raw.receive() for _ in range(80)]
        assert sum(len(content) - 16 for content in got if isinstance(content, bytes)) >= 75 * WINDOW


async def test_late_frames_of_a_stream_that_is_over_are_dropped():
    async with raw_to_peer({ProcessInput: read_one}, limits=SMALL) as (raw, peer):
        await raw.call(1, "process.input", process_id="p", channel=1)
        await raw.send_binary(frame.data(1, 0, bytes(1000)))
        assert await raw.receive() == frame.reset(1, "the reader stopped")
        assert (await raw.receive())["id"] == 1
        for late in (frame.data(1, 1000, bytes(WINDOW - 1000)), frame.end(1, WINDOW), frame.credit(1, 9)):
            await raw.send_binary(late)
        await raw.send_binary(frame.reset(1, "me too"))
        await raw.call(2, "ping")
        await raw.receive()
        assert peer.ignored == {"frame of an unknown stream": 0}
        await raw.send_binary(frame.data(1, WINDOW, b"x"))  # more than the credit it had
        await raw.call(3, "ping")
        await raw.receive()
        assert peer.ignored == {"frame of an unknown stream": 1}


async def read_one(params, call):
    async with call.reading(params.channel) as reader:
        return Count(len((await anext(reader)).data))


async def test_frames_of_streams_that_never_were_end_the_connection_at_last():
    async with raw_to_peer() as (raw, peer):
        for _ in range(10_000):
            await raw.send_binary(frame.data(2, 0, b"x"))
        await raw.call(1, "ping")
        assert (await raw.receive())["id"] == 1
        assert "unknown streams" in await closes_with(raw, peer, 4400, frame.data(2, 0, b"x"))


async def test_streams_nobody_takes_up_are_given_up():
    async with raw_to_peer({ProcessInput: read_numbers}, limits=SMALL) as (raw, peer):
        for channel in range(1, 2 * 9, 2):
            await raw.send_binary(frame.data(channel, 0, bytes(WINDOW)))
        assert await raw.receive() == frame.reset(1, "nobody took the stream up")
        for channel in range(101, 101 + 2 * 70, 2):
            await raw.send_binary(frame.end(channel, 0))
        assert sum(each.reader.window.held for each in peer._streams._pending.values()) <= 8 * WINDOW
        await raw.call(1, "process.input", process_id="p", channel=239)
        while (answer := await raw.receive()) and not isinstance(answer, dict):
            assert frame.unpack(answer).reason == "nobody took the stream up"
        assert answer["result"] == {"bytes": 0}
        assert len(peer._streams._pending) <= 64
