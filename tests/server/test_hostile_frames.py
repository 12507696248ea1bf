"""Hostile WebSocket frames on an initialised connection, and the close code that answers them."""

from __future__ import annotations

import struct

import pytest

from tests.server.wire import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, call, frame

LIMIT = 1 << 20
ASK = call("ping", 7)


def binary(kind: int, stream: int = 1, offset: int = 0, payload: bytes = b"", *, version=1, flags=0) -> bytes:
    return frame(BINARY, struct.pack(">BBHIQ", version, kind, flags, stream, offset) + payload)


def close(code: int, reason: bytes = b"") -> bytes:
    return frame(CLOSE, struct.pack(">H", code) + reason)


DATA, END, CREDIT, RESET, PIECE = range(5)

CLOSED: dict[str, tuple[bytes, int, str]] = {
    "11 unmasked": (frame(TEXT, ASK, masked=False), 1002, "masked"),
    "11 RSV1": (frame(TEXT, ASK, rsv=0x40), 1002, ""),
    "11 RSV2": (frame(TEXT, ASK, rsv=0x20), 1002, ""),
    "11 RSV3": (frame(TEXT, ASK, rsv=0x10), 1002, ""),
    **{f"11 opcode {code}": (frame(code, b"x"), 1002, "") for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "11 length not minimal": (frame(TEXT, ASK, width=8), 1002, "shortest form"),
    "12 invalid UTF-8": (frame(TEXT, b'"\xff"'), 1007, "UTF-8"),
    "12 surrogates": (frame(TEXT, b'"\xed\xa0\x80"'), 1007, "UTF-8"),
    "12 overlong": (frame(TEXT, b'"\xc0\xaf"'), 1007, "UTF-8"),
    "13 2**31": (frame(TEXT, width=8, length=2**31), 1009, "limit 1048576"),
    "13 2**63": (frame(TEXT, width=8, length=2**63), 1009, "limit 1048576"),
    "13 2**63 + 1": (frame(TEXT, width=8, length=2**63 + 1), 1009, "limit 1048576"),
    "13 1 MiB + 1": (frame(TEXT, b"x" * (LIMIT + 1)), 1009, "limit 1048576"),
    "14 endless fragments": (
        frame(TEXT, b"x" * 1000, final=False) + frame(CONTINUATION, b"x" * 1000, final=False) * 1100,
        1009,
        "limit 1048576",
    ),
    "14 500 000 empty fragments": (
        frame(TEXT, final=False) + frame(CONTINUATION, final=False) * 500_000,
        1008,
        "limit 4096 fragments",
    ),
    "14 text inside of fragments": (frame(TEXT, b"{", final=False) + frame(TEXT, ASK), 1002, ""),
    "14 lone continuation": (frame(CONTINUATION, ASK), 1002, ""),
    "14 fragmented ping": (frame(PING, final=False), 1002, ""),
    "14 long ping": (frame(PING, b"x" * 126), 1002, ""),
    "15 100 000 pings": (frame(PING, b"x") * 100_000, 1008, "control frames"),
    "15 100 000 pongs": (frame(PONG) * 100_000, 1008, "control frames"),
    "15 close with one byte": (frame(CLOSE, b"x"), 1002, ""),
    **{f"15 close with {code}": (close(code), 1002, "") for code in (999, 1005)},
    "15 close reason no UTF-8": (close(1000, b"\xff"), 1007, ""),
    "16 short header": (frame(BINARY, b"\1\0"), 4400, "bad_binary_header"),
    "16 empty": (frame(BINARY), 4400, "bad_binary_header"),
    "16 unknown version": (binary(DATA, version=2), 4400, "bad_binary_header"),
    "16 unknown kind": (binary(9), 4400, "bad_binary_header"),
    "16 payload too long": (binary(DATA, payload=b"x" * 65_537), 4400, "bad_binary_header"),
    "16 piece at the wrong place": (
        binary(PIECE, stream=1, offset=5, payload=b"x"),
        4400,
        "bad_binary_header",
    ),
    "16 piece of a wrong stream": (binary(PIECE, stream=9, payload=b"x"), 4400, "bad_binary_header"),
    "16 past the credit": (
        b"".join(binary(DATA, offset=n << 16, payload=bytes(1 << 16)) for n in range(17)),
        4400,
        "bad_binary_header",
    ),
    "16 backwards": (
        binary(DATA, offset=9, payload=b"x") + binary(DATA, payload=b"x"),
        4400,
        "bad_binary_header",
    ),
    "16 after its end": (binary(END) + binary(DATA, payload=b"x"), 4400, "bad_binary_header"),
}


@pytest.mark.parametrize(("data", "code", "reason"), CLOSED.values(), ids=CLOSED)
async def test_a_hostile_frame_closes_the_connection(server, data, code, reason):
    async with server.session() as wire:
        await wire.send(data)
        ended = await wire.ended()
        assert ended.code == code
        assert reason in ended.reason


FINE = {
    "12 a character in two fragments": frame(TEXT, ASK[:-1] + b',"x":"\xc3', final=False)
    + frame(CONTINUATION, b'\xa4"}'),
    "13 1 MiB": frame(TEXT, ASK.ljust(LIMIT)),
    "14 4096 fragments": frame(TEXT, ASK[:1], final=False)
    + frame(CONTINUATION, final=False) * 4094
    + frame(CONTINUATION, ASK[1:]),
    "14 ping between fragments": frame(TEXT, ASK[:9], final=False)
    + frame(PING)
    + frame(CONTINUATION, ASK[9:]),
    "15 100 pings": frame(PING, b"x") * 100 + frame(TEXT, ASK),
    "16 bytes of an unknown stream": binary(RESET, stream=99)
    + binary(CREDIT, stream=98, offset=5)
    + frame(TEXT, ASK),
}


@pytest.mark.parametrize("data", FINE.values(), ids=FINE)
async def test_an_unusual_frame_is_fine(server, data):
    async with server.session() as wire:
        await wire.send(data)
        assert (await wire.message())["id"] == 7


async def test_data_after_a_close_is_ignored(server):
    async with server.session() as wire:
        await wire.send(close(1000) + frame(TEXT, ASK))
        assert (await wire.frame())[0] == CLOSE
        assert await wire.rest() == b""


async def test_a_stranger_may_not_fill_memory_before_it_shows_a_key(server):
    async with await server.wire() as wire:
        await wire.upgrade(None)
        await wire.send(frame(TEXT, b"x" * 70_000))
        assert await wire.ended() == (1008, "limit 65536 bytes before initialize")


async def test_other_connections_do_not_notice(server):
    async with server.session() as good, server.session() as bad:
        await bad.send(frame(TEXT, final=False) + frame(CONTINUATION, final=False) * 100_000)
        assert (await good.call("ping"))["result"] == {}
        assert (await bad.ended()).code == 1008
