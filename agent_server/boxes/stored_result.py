"""What an operation answered, as it is written down, and how it is given again to a call that is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent_sdk.protocol.errors import AgentServerError, ErrorObject, from_wire, to_wire
from agent_sdk.protocol.methods.method import Effect, Method, Stream, result_type
from agent_sdk.protocol.methods.workspace import Executed
from agent_server.boxes.forwarded_call import KEPT_BYTES, CallerStream

NOT_KEPT = "its output is not kept any more"


class StoredResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an operation answered, as it is written down."""

    answer: bytes | None = None
    """JSON."""
    error: ErrorObject | None = None
    output: dict[str, bytes] | None = None
    """By the field of its stream; None: it was too much to keep."""

    @classmethod
    def of(cls, params: Method[Any], answer: Any, output: Mapping[str, bytes | bytearray] | None) -> Self:
        """Write an answer down with the output that belongs to it, where it is not too long."""
        texts = {stream.text: getattr(answer, stream.text) or "" for stream in params.gives if stream.text}
        if sum(map(len, texts.values())) > KEPT_BYTES:
            gone = {name: None for name, text in texts.items() if text}
            answer, output = replace(answer, **gone), None
        kept = None if output is None else {name: bytes(data) for name, data in output.items()}
        return cls(answer=msgspec.json.encode(answer), output=kept)

    @classmethod
    def of_error(cls, error: AgentServerError) -> Self:
        """Write down that it failed, and how."""
        return cls(error=to_wire(error))

    @classmethod
    def read(cls, written: bytes) -> Self:
        """The opposite of `written`."""
        return msgspec.msgpack.decode(written, type=cls)

    @property
    def whole(self) -> bool:
        """Whether all is here that a repeated call gets."""
        return self.answer is None or self.output is not None

    def written(self) -> bytes:
        """Return it as bytes."""
        return msgspec.msgpack.encode(self)

    async def give(self, params: Effect[Any], streams: Mapping[str, CallerStream]) -> Any:
        """Answer a repeated call: with its bytes over its own streams, or as text where it has none.

        Raises:
            AgentServerError: the operation failed with it.
        """
        if self.error is not None:
            raise from_wire(self.error)
        assert self.answer is not None
        answer: Any = msgspec.json.decode(self.answer, type=result_type(type(params)))
        for stream in (stream for stream in params.gives if stream.text):
            field, size = stream.channel, getattr(answer, stream.size)
            data = self._bytes(answer, stream)
            if isinstance(answer, Executed) and data is None and size:
                answer = replace(answer, reason=answer.reason or NOT_KEPT)
            if field in streams:
                await streams[field].pass_on(0, data or b"")
                await streams[field].finish(size, b"")
            else:
                text = None if data is None or answer.status == "unknown" else data.decode(errors="replace")
                answer = replace(answer, **{stream.text: text})
        return answer

    def _bytes(self, answer: Any, stream: Stream) -> bytes | None:
        """Return the output that is kept; None: there was some, and it is not."""
        if (text := getattr(answer, stream.text)) is not None:
            return str(text).encode()
        if not getattr(answer, stream.size):
            return b""
        return None if self.output is None else self.output.get(stream.channel)
