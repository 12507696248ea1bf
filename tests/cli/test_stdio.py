"""Writing to a reader that does not read."""

import asyncio
import os

import msgspec
import pytest

from agent_sdk.protocol.errors import WorkspaceUnavailable, shown, visible
from agent_server.cli.terminal import Inlet, Outlet, Terminal, json_line, one_line


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as source, os.fdopen(writing, "wb", 0) as sink:
        yield source, sink


async def test_bytes_arrive_in_order_although_the_reader_is_slow(pipe):
    source, sink = pipe
    data = os.urandom(1 << 20)
    sending = asyncio.create_task(Outlet(sink.fileno()).write(data))
    got = b""
    while len(got) < len(data):
        got += await Inlet(source.fileno()).read()
    await sending
    assert got == data


async def test_a_reader_that_does_not_read_holds_up_nobody_else(pipe):
    sending = asyncio.create_task(Outlet(pipe[1].fileno()).write(bytes(1 << 20)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not sending.done()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_a_reader_that_left_is_a_broken_pipe(pipe):
    pipe[0].close()
    with pytest.raises(BrokenPipeError):
        await Outlet(pipe[1].fileno()).write(b"x")


async def test_a_reader_that_leaves_meanwhile_is_a_broken_pipe(pipe):
    sending = asyncio.create_task(Outlet(pipe[1].fileno()).write(bytes(1 << 20)))
    for _ in range(100):
        await asyncio.sleep(0)
    pipe[0].close()
    with pytest.raises(BrokenPipeError):
        await sending


async def test_a_file_takes_everything_at_once(tmp_path):
    file = tmp_path / "out"
    with file.open("wb") as opened:
        await Outlet(opened.fileno()).write(b"a" * 100_000)
    assert file.read_bytes() == b"a" * 100_000


@pytest.fixture
def nothing():
    with open(os.devnull, "rb") as opened:
        yield opened


async def test_a_file_is_read_to_its_end(tmp_path):
    file = tmp_path / "in"
    file.write_bytes(b"a" * 100_000)
    with file.open("rb") as opened:
        assert await Inlet(opened.fileno()).read_all() == b"a" * 100_000


async def test_dev_null_ends_at_once(nothing):
    assert await Inlet(nothing.fileno()).read_all() == b""


async def test_reading_can_be_cancelled_and_loses_nothing(pipe):
    inlet = Inlet(pipe[0].fileno())
    waiting = asyncio.create_task(inlet.read())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    pipe[1].write(b"still here")
    assert await inlet.read() == b"still here"


async def test_text_that_is_no_unicode_can_be_written(pipe):
    await Terminal(Outlet(pipe[1].fileno())).line("half a character: \ud83d")
    assert pipe[0].read(100) == b"half a character: \\ud83d\n"


def test_control_characters_are_shown_and_lines_stay():
    assert visible("a\tb\r\nc\rd\x1b[0m\x00\n") == "a\tb\nc\\rd\\x1b[0m\\x00\n"


def test_many_lines_become_one():
    assert one_line(" a\n\n  b\x07 ") == "a b\\x07"


HIDDEN = [
    "\x1b[2J",
    "\x7f",
    "\x9b31m",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u00ad",
    "\u2028",
    "\U000e0041",
    "\U000e0100",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_what_drives_a_terminal_or_hides_is_shown_everywhere_the_same(text):
    line = json_line(msgspec.json.encode({"a": text, "b": "\u00fc \U0001f600"}))
    assert msgspec.json.decode(line) == {"a": text, "b": "\u00fc \U0001f600"}
    for what in (visible(text), shown(text), line.decode(), str(WorkspaceUnavailable(f"it said {text}"))):
        assert not set(text) & set(what) - set("[2J31m")
    assert "\u00fc \U0001f600" in line.decode()
