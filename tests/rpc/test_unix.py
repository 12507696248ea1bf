"""Pipes over a Unix socket: who may connect, what is refused, what is left behind."""

import asyncio
import errno
import os
import resource
import socket
import stat
import struct
from contextlib import suppress

import pytest

from agent_sdk.protocol.errors import ConnectionLost, PathExists, WorkspaceUnavailable
from agent_sdk.rpc.unix import connect_unix, serve_unix

pytestmark = pytest.mark.timeout(30)


async def echo(pipe):
    while True:
        frame, text = await pipe.receive()
        await pipe.send(frame, text=text)


async def test_only_its_owner_may_connect(tmp_path):
    path = str(tmp_path / "socket")
    async with serve_unix(path, echo):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


async def test_the_socket_is_gone_afterwards(tmp_path):
    path = str(tmp_path / "socket")
    async with serve_unix(path, echo):
        pass
    assert os.listdir(tmp_path) == []
    with pytest.raises(WorkspaceUnavailable, match="cannot connect to"):
        await connect_unix(path)


async def test_several_clients_are_served_at_the_same_time(tmp_path):
    path = str(tmp_path / "socket")
    async with serve_unix(path, echo):
        pipes = [await connect_unix(path) for _ in range(5)]
        for number, pipe in enumerate(pipes):
            await pipe.send(b"%d" % number, text=True)
        assert [(await pipe.receive())[0] for pipe in pipes] == [b"0", b"1", b"2", b"3", b"4"]
        await asyncio.gather(*(pipe.close() for pipe in pipes))


async def test_a_path_may_be_longer_than_an_address(tmp_path):
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    path = str(folder / "socket")
    async with serve_unix(path, echo):
        pipe = await connect_unix(path)
        await pipe.send(b"hello", text=True)
        assert await pipe.receive() == (b"hello", True)
        await pipe.close()
    assert list(folder.iterdir()) == []


async def test_a_name_that_is_too_long_is_refused_with_one_sentence(tmp_path):
    for attempt in (
        connect_unix(str(tmp_path / ("z" * 300))),
        enter(serve_unix(str(tmp_path / ("z" * 300)), echo)),
    ):
        with pytest.raises(WorkspaceUnavailable, match="cannot"):
            await attempt


async def enter(context):
    async with context:
        pass


async def test_the_socket_of_a_dead_process_is_replaced(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with serve_unix(path, echo):
        await (await connect_unix(path)).close()


async def test_a_socket_in_use_is_left_alone(tmp_path):
    path = str(tmp_path / "socket")
    async with serve_unix(path, echo):
        with pytest.raises(PathExists, match="in use"):
            await enter(serve_unix(path, echo))
        await (await connect_unix(path)).close()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(PathExists):
        await enter(serve_unix(str(path), echo))
    assert path.read_text() == "precious"


async def test_a_missing_folder_is_said_in_one_sentence(tmp_path):
    with pytest.raises(WorkspaceUnavailable, match="cannot listen at .*: No such file"):
        await enter(serve_unix(str(tmp_path / "nowhere" / "socket"), echo))


async def test_leaving_ends_the_connections_and_what_serves_them(tmp_path):
    path = str(tmp_path / "socket")
    ended = asyncio.Event()

    async def serve(pipe):
        try:
            await pipe.receive()
        finally:
            ended.set()

    async with serve_unix(path, serve):
        pipe = await connect_unix(path)
        await pipe.send(b"", text=True)
        await pipe.send(b"", text=True)
        await ended.wait()
        other = await connect_unix(path)
    for gone in (pipe, other):
        with pytest.raises(ConnectionLost):
            await gone.receive()
        await gone.close()


async def test_what_fails_while_serving_one_client_is_reported_and_harms_no_other(tmp_path):
    seen = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))

    async def fail(pipe):
        if (await pipe.receive())[0] == b"fail":
            raise ZeroDivisionError
        await pipe.send(b"fine", text=True)

    path = str(tmp_path / "socket")
    async with serve_unix(path, fail):
        bad, good = await connect_unix(path), await connect_unix(path)
        await bad.send(b"fail", text=True)
        with pytest.raises(ConnectionLost):
            await bad.receive()
        await good.send(b"", text=True)
        assert await good.receive() == (b"fine", True)
        await asyncio.gather(good.close(), bad.close())
    assert [type(exc) for exc in seen] == [ZeroDivisionError]


async def test_a_connection_waits_while_there_is_no_descriptor_for_it(tmp_path):
    loop, limits = asyncio.get_running_loop(), resource.getrlimit(resource.RLIMIT_NOFILE)
    served, seen = asyncio.Event(), []

    def reported(_, context):
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        seen.append(context["exception"].errno)

    async def serve(pipe):
        served.set()

    loop.set_exception_handler(reported)
    path = str(tmp_path / "socket")
    async with serve_unix(path, serve):
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            next_descriptor = os.dup(0)
            os.close(next_descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_descriptor, limits[1]))
            try:
                await loop.sock_connect(client, path)
                await served.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert seen == [errno.EMFILE]


# -- by hand


async def spoken_by_hand(tmp_path, *parts):
    """What the accepting pipe makes of these bytes."""
    outcome = asyncio.get_running_loop().create_future()

    async def serve(pipe):
        got = []
        try:
            while True:
                got.append(await pipe.receive())
        except ConnectionLost as lost:
            outcome.set_result((got, lost))

    path = str(tmp_path / "socket")
    async with serve_unix(path, serve, frame_bytes=1000):
        reader, writer = await asyncio.open_unix_connection(path)
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
        answer = b""
        with suppress(ConnectionError):  # a close with unread bytes is a reset
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
        return *await outcome, answer


def framed(kind, content):
    return struct.pack(">IB", len(content), kind) + content


async def test_frames_may_be_cut_anywhere_by_the_transport(tmp_path):
    stream = framed(1, b"text") + framed(2, b"x" * 1000) + framed(1, b"")
    got, lost, _ = await spoken_by_hand(tmp_path, *(stream[n : n + 1] for n in range(len(stream))))
    assert got == [(b"text", True), (b"x" * 1000, False), (b"", True)]
    assert lost.details["close_code"] == 1006


async def test_a_frame_that_is_too_long_is_refused_before_it_comes(tmp_path):
    got, lost, answer = await spoken_by_hand(tmp_path, framed(1, b"fine"), struct.pack(">IB", 1001, 1))
    assert got == [(b"fine", True)]
    assert lost.details == {"close_code": 1009, "reason": "limit 1000"}
    assert answer == framed(8, struct.pack(">H", 1009) + b"limit 1000")


async def test_a_frame_of_an_unknown_kind_is_refused(tmp_path):
    _, lost, answer = await spoken_by_hand(tmp_path, framed(7, b"?"))
    assert lost.details["close_code"] == 1002
    assert answer[4:7] == b"\x08" + struct.pack(">H", 1002)


async def test_a_close_frame_without_a_code_is_a_close(tmp_path):
    _, lost, _ = await spoken_by_hand(tmp_path, framed(8, b""), b"more")
    assert lost.details["close_code"] == 1005
