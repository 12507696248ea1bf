"""What every pipe promises: in memory, over a Unix socket, over a WebSocket."""

import asyncio

import pytest

from agent_sdk.protocol.errors import ConnectionLost

pytestmark = pytest.mark.timeout(30)


async def test_frames_arrive_whole_and_in_order(pipes):
    here, there = pipes
    sent = [(b"text", True), (b"\x00\xff", False), (b"", True), (b"x" * 65552, False), ("é".encode(), True)]
    for frame, text in sent:
        await here.send(frame, text=text)
    assert [await there.receive() for _ in sent] == sent


async def test_both_ends_speak_at_the_same_time(pipes):
    async def speak(pipe):
        for number in range(100):
            await pipe.send(b"%d" % number, text=True)

    async def listen(pipe):
        return [int((await pipe.receive())[0]) for _ in range(100)]

    here, there = pipes
    _, _, one, other = await asyncio.gather(speak(here), speak(there), listen(here), listen(there))
    assert one == other == list(range(100))


async def test_a_frame_may_be_reused_when_it_was_sent(pipes):
    here, there = pipes
    buffer = bytearray(b"a" * 70_000)
    await here.send(memoryview(buffer), text=False)
    buffer[:] = b"b" * 70_000
    await here.send(buffer, text=False)
    buffer[:] = b"c" * 70_000
    assert [set((await there.receive())[0]) for _ in range(2)] == [{ord("a")}, {ord("b")}]


async def test_a_full_transport_makes_the_sender_wait(pipes):
    here, there = pipes
    frame = bytes(1 << 18)
    sent = 0

    async def flood():
        nonlocal sent
        for _ in range(200):
            await here.send(frame, text=False)
            sent += 1

    flooding = asyncio.create_task(flood())
    while True:
        before = sent
        await asyncio.wait({flooding}, timeout=0.2)
        if sent == before:
            break
    assert not flooding.done()  # 50 MiB fit into no transport
    for _ in range(200):
        assert len((await there.receive())[0]) == len(frame)
    await flooding


async def test_what_is_sent_at_once_has_to_find_room_and_keeps_its_place(pipes):
    here, there = pipes
    frame = bytes(1 << 18)
    sent = 0
    while here.send_now(frame, text=False):
        sent += 1
        assert sent < 200  # 50 MiB fit into no transport
    sending = asyncio.create_task(here.send(b"last", text=True))
    assert [len((await there.receive())[0]) for _ in range(sent)] == [len(frame)] * sent
    assert await there.receive() == (b"last", True)
    await sending


async def test_nothing_is_sent_at_once_after_the_end(pipes):
    here, there = pipes
    await asyncio.gather(here.close(), there.close())
    assert not here.send_now(b"x", text=False)


async def test_cancelling_a_receive_loses_nothing(pipes):
    here, there = pipes
    receiving = asyncio.create_task(there.receive())
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.wait({receiving})
    await here.send(b"kept", text=True)
    assert await there.receive() == (b"kept", True)


async def test_the_other_end_learns_why_it_was_closed(pipes):
    here, there = pipes
    await here.send(b"last words", text=True)
    closing = asyncio.create_task(here.close(4401, "no key"))
    assert (await there.receive())[0] == b"last words"
    with pytest.raises(ConnectionLost) as caught:
        await there.receive()
    assert caught.value.details == {"close_code": 4401, "reason": "no key"}
    await closing
    with pytest.raises(ConnectionLost):
        await there.send(b"too late", text=True)


async def test_the_closing_end_stops_receiving_and_sending(pipes):
    here, there = pipes
    receiving = asyncio.create_task(here.receive())
    await asyncio.sleep(0)
    await asyncio.gather(here.close(1000), there.close(1000))
    for attempt in (receiving, here.receive(), here.send(b"x", text=False)):
        with pytest.raises(ConnectionLost):
            await attempt


async def test_a_pipe_may_be_closed_again_by_either_end(pipes):
    here, there = pipes
    await asyncio.gather(here.close(4000, "first"), there.close(4001, "second"))
    await asyncio.gather(here.close(4002), there.close(4003))
    with pytest.raises(ConnectionLost):
        await here.receive()


async def test_closing_wakes_a_sender_that_waits_for_room(pipes):
    here, there = pipes

    async def flood():
        while True:
            await here.send(bytes(1 << 18), text=False)

    flooding = asyncio.create_task(flood())
    await asyncio.wait({flooding}, timeout=0.2)
    await asyncio.gather(there.close(4408, "slow"), here.close())
    with pytest.raises(ConnectionLost):
        await flooding
