"""Which byte streams a connection has, and whose frame a binary frame is.

A stream is opened by the caller, who puts its number into the params of a call; the handler takes
it up by that number. Frames may overtake the handler's start, so what arrives for a stream of the
other end that nobody has taken up yet is kept, within bounds. Frames of a stream that is over may
be on their way for a while: they are dropped.
"""

from __future__ import annotations

from typing import TypeVar

from agent_sdk.protocol import frame as frames
from agent_sdk.protocol.errors import (
    BadBinaryHeader,
    ConnectionLost,
    InvalidParams,
    TransferBroken,
)
from agent_sdk.protocol.specs import Limits
from agent_sdk.rpc.lanes import Lanes
from agent_sdk.rpc.stream import ByteReader, ByteWriter

EARLY_STREAMS = 64
EARLY_WINDOWS = 8
REMEMBERED = 4096
STRAY_FRAMES = 10_000

S = TypeVar("S", bound=ByteReader | ByteWriter)


class Early:
    """What came for a stream before anybody took it up."""

    def __init__(self, reader: ByteReader) -> None:
        self.reader = reader
        self.allowed = 0
        self.broken: TransferBroken | None = None


class Channels:
    """The byte streams of one connection."""

    def __init__(self, lanes: Lanes, limits: Limits, *, opener: bool) -> None:
        """Make an empty table; `opener`: our numbers are odd."""
        self.other_window = limits.window_bytes
        self.strays = 0
        """Data frames of streams that never existed, or past what a stream's credit can explain."""
        self._lanes = lanes
        self._window = limits.window_bytes
        self._ours = 1 if opener else 0
        self._last = -1 if opener else 0
        self._open: dict[int, ByteReader | ByteWriter] = {}
        self._early: dict[int, Early] = {}
        self._over: dict[int, int] = {}
        self._lost: ConnectionLost | None = None

    def open_reader(self) -> ByteReader:
        """Return a stream of ours that the other end writes; enter it."""
        self._last += 2
        return self._add(ByteReader(self._last, self._window, self._lanes, self._leave_reader))

    def open_writer(self) -> ByteWriter:
        """Return a stream of ours that the other end reads; enter it."""
        self._last += 2
        return self._add(
            ByteWriter(self._last, self.other_window, self._lanes, self._end, self._leave_writer)
        )

    def reading(self, channel: int) -> ByteReader:
        """Return a stream of theirs that they write; enter it.

        Raises:
            InvalidParams: it is none that they have just opened.
        """
        early = self._take_up(channel)
        return self._add(
            early.reader if early else ByteReader(channel, self._window, self._lanes, self._leave_reader)
        )

    def writing(self, channel: int) -> ByteWriter:
        """Return a stream of theirs that we write; enter it.

        Raises:
            InvalidParams: it is none that they have just opened.
        """
        early = self._take_up(channel)
        writer = ByteWriter(channel, self.other_window, self._lanes, self._end, self._leave_writer)
        if early is not None:
            if early.broken is not None:
                writer.fail(early.broken)
            writer.granted(max(early.allowed, self.other_window))
        return self._add(writer)

    def receive(self, frame: frames.BinaryFrame) -> None:
        """Hand a frame to its stream.

        Raises:
            BadBinaryHeader: it breaks the rules of its stream, or too many belong to none.
        """
        match frame:
            case frames.Data() | frames.End():
                stream = self._open.get(frame.stream)
                if isinstance(stream, ByteReader):
                    stream.take(frame)
                else:
                    self._unopened(frame, stream)
            case frames.Credit():
                self._credit(frame)
            case frames.Reset():
                self._reset(frame)

    def lose(self, lost: ConnectionLost) -> None:
        """The connection is gone."""
        self._lost = lost
        for stream in self._open.values():
            stream.fail(lost)
        self._early.clear()

    def _is_theirs(self, channel: int) -> bool:
        return channel > 0 and channel % 2 != self._ours

    def _take_up(self, channel: int) -> Early | None:
        if channel <= 0 or channel % 2 == self._ours or channel in self._open or channel in self._over:
            raise InvalidParams(f"channel {channel} is not one you have just opened")
        return self._early.pop(channel, None)

    def _leave_reader(self, reader: ByteReader) -> None:
        expected = 0 if reader.window.ended else reader.window.expected
        if not reader.window.ended and not reader.over:
            self._lanes.put_control(frames.reset(reader.channel, "the reader stopped"))
        self._end(reader.channel, expected)

    def _leave_writer(self, writer: ByteWriter) -> None:
        if not writer.finished and self._open.get(writer.channel) is writer:
            writer.fail(TransferBroken("the stream was left unfinished"))
            self._lanes.put_control(frames.reset(writer.channel, "the writer stopped"))
            self._end(writer.channel)

    def _add(self, stream: S) -> S:
        if self._lost is not None:
            stream.fail(self._lost)
        self._open[stream.channel] = stream
        return stream

    def _end(self, channel: int, expected: int = 0) -> None:
        """Forget a stream, except for how many bytes may still be on their way."""
        if self._open.pop(channel, None) is None and self._early.pop(channel, None) is None:
            return
        self._over[channel] = expected
        if len(self._over) > REMEMBERED:
            del self._over[next(iter(self._over))]

    def _unopened(self, frame: frames.Data | frames.End, stream: ByteWriter | None) -> None:
        if stream is not None:
            raise BadBinaryHeader(f"stream {frame.stream} flows the other way")
        if self._is_theirs(frame.stream) and frame.stream not in self._over:
            early = self._early_one(frame.stream)
            early.reader.take(frame)
            return self._bound_early()
        if isinstance(frame, frames.Data):
            left = self._over.get(frame.stream, 0) - len(frame.payload)
            if left >= 0:
                self._over[frame.stream] = left
            else:
                self._count_stray()
        return None

    def _credit(self, frame: frames.Credit) -> None:
        stream = self._open.get(frame.stream)
        if isinstance(stream, ByteWriter):
            stream.granted(frame.allowed)
        elif stream is not None:
            raise BadBinaryHeader(f"stream {frame.stream} flows the other way")
        elif self._is_theirs(frame.stream) and frame.stream not in self._over:
            self._early_one(frame.stream).allowed = frame.allowed
            self._bound_early()

    def _reset(self, frame: frames.Reset) -> None:
        error = TransferBroken(f"the other end gave up: {frame.reason}")
        stream = self._open.get(frame.stream)
        if stream is not None:
            stream.fail(error)
            if isinstance(stream, ByteWriter):
                self._end(stream.channel)
        elif self._is_theirs(frame.stream) and frame.stream not in self._over:
            early = self._early_one(frame.stream)
            early.broken = error
            early.reader.fail(error)
            self._bound_early()

    def _early_one(self, channel: int) -> Early:
        if channel not in self._early:
            self._early[channel] = Early(ByteReader(channel, self._window, self._lanes, self._leave_reader))
        return self._early[channel]

    def _bound_early(self) -> None:
        """Give up the oldest while too many streams, or too many bytes, wait to be taken up."""
        while len(self._early) > EARLY_STREAMS or self._early_bytes() > EARLY_WINDOWS * self._window:
            channel = next(iter(self._early))
            early = self._early[channel]
            if not early.reader.over:
                self._lanes.put_control(frames.reset(channel, "nobody took the stream up"))
            self._end(channel, early.reader.window.expected)

    def _early_bytes(self) -> int:
        return sum(early.reader.window.held for early in self._early.values())

    def _count_stray(self) -> None:
        self.strays += 1
        if self.strays > STRAY_FRAMES:
            raise BadBinaryHeader("too many frames of unknown streams")
