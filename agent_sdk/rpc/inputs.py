"""What calls are to read, over one connection after the other: what has come when one breaks off waits for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent_sdk.protocol.errors import LimitExceeded, TransferBroken
from agent_sdk.rpc.peer import Inbound
from agent_sdk.rpc.stream import ByteReader

INPUT_BYTES = 64 << 20
"""Of one call, and of all that wait together; the oldest gives way."""
KEPT_SECONDS = 600.0


class Input:
    """What has come for one call. One at a time reads on, whose turn it is."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.turn = asyncio.Lock()
        self.come = bytearray()
        self.size = 0
        """Of all of it, once all has come and was handed over."""
        self.end: asyncio.TimerHandle | None = None
        self._reader: ByteReader | None = None

    async def read(self, reader: ByteReader) -> bytes:
        """Return all of it, when the rest has come over this stream.

        Raises:
            LimitExceeded: it is too long.
            TransferBroken, ConnectionLost: it broke off; what has come is kept.
        """
        self._reader = reader
        async for offset, data in reader:
            self._begin_at(offset)
            self.come += data
            if (got := len(self.come)) > self._limit:
                self.come.clear()
                raise LimitExceeded(
                    f"stdin: at most {self._limit} bytes", field="stdin", limit=self._limit, got=got
                )
        self._begin_at(reader.size)
        whole, self.come = bytes(self.come), bytearray()
        self.size = len(whole)
        return whole

    def _begin_at(self, offset: int) -> None:
        if (missing := offset - len(self.come)) > 0:
            raise TransferBroken(f"stdin: {missing} bytes are missing at {len(self.come)}")
        del self.come[offset:]

    def let_go(self) -> None:
        """End the stream it still comes over, behind what has come."""
        if self._reader is not None:
            self._reader.fail(TransferBroken("another call goes on with it"))


class Inputs:
    """What calls are to read, by op_id."""

    def __init__(self, limit: int = INPUT_BYTES) -> None:
        self._limit = limit
        self._inputs: dict[str, Input] = {}

    async def settled(self, op_id: str) -> Input | None:
        """Return what has come for a call, when nothing more comes; None: nothing is known of it."""
        if (known := self._inputs.get(op_id)) is not None:
            known.let_go()
            async with known.turn:
                pass
        return known

    @asynccontextmanager
    async def turn(self, op_id: str, call: Inbound) -> AsyncIterator[Input]:
        """Read on, instead of whoever does so for this call now. A call that is cancelled on purpose leaves nothing."""
        known = self._inputs.pop(op_id, None) or Input(self._limit)
        self._inputs[op_id] = known  # behind the others
        known.let_go()
        if known.end is not None:
            known.end.cancel()
        try:
            async with known.turn:
                yield known
        except asyncio.CancelledError:
            if not call.abandoned:
                self._forget(op_id, known)
            raise
        finally:
            known.end = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget, op_id, known)
            self._bound()

    def _bound(self) -> None:
        for oldest in tuple(self._inputs):
            if sum(len(each.come) for each in self._inputs.values()) <= self._limit:
                return
            if not self._inputs[oldest].turn.locked():
                del self._inputs[oldest]

    def _forget(self, op_id: str, known: Input) -> None:
        if self._inputs.get(op_id) is known and not known.turn.locked():
            del self._inputs[op_id]
