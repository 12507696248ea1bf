"""The text in a file's bytes, and back without changing anything else: encoding, byte order mark and line ends stay."""

from __future__ import annotations

import codecs

from msgspec import Struct

from agent_sdk.protocol.errors import ToolError

LOOKED_AT = 8 << 10
"""Bytes at the beginning that tell text from something else."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NOT_IN_TEXT = bytes(sorted({*range(0x20), 0x7F} - {*b"\b\t\n\f\r\x1b"}))


class TextFile(Struct, frozen=True):
    """A decoded file."""

    text: str
    """With `\\n` for every line end when the file uses CRLF throughout, else as it is."""
    encoding: str = "utf-8"
    mark: bytes = b""
    """The byte order mark."""
    crlf: bool = False
    """Every line ends with CRLF."""

    @property
    def lines(self) -> list[str]:
        """Without their ends; an end at the end of the file begins no further line."""
        lines = self.text.split("\n")
        return lines[:-1] if lines[-1] == "" else lines


def decode_text(data: bytes) -> TextFile | None:
    """Return the text of a file: UTF-8, UTF-16 with a mark, else Latin-1; None when it is no text."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return _of(data[len(mark) :].decode(encoding), encoding, mark)
            except UnicodeDecodeError:
                return None
    beginning = data[:LOOKED_AT]
    strange = len(beginning) - len(beginning.translate(None, _NOT_IN_TEXT))
    if b"\0" in data or strange * 10 > len(beginning):
        return None
    try:
        return _of(data.decode(), "utf-8")
    except UnicodeDecodeError:
        return _of(data.decode("latin-1"), "latin-1")


def encode_text(file: TextFile, text: str) -> bytes:
    """Return the bytes of a new text for this file.

    Raises:
        ToolError: the file's encoding has no way to say a character.
    """
    if file.crlf:
        text = text.replace("\n", "\r\n")
    try:
        return file.mark + text.encode(file.encoding)
    except UnicodeEncodeError as exc:
        character = text[exc.start]
        raise ToolError(
            f"new_str: the file is {file.encoding} and cannot hold {character!r}; "
            "convert the file with the terminal first (iconv), or do without the character"
        ) from None


def _of(text: str, encoding: str, mark: bytes = b"") -> TextFile:
    ends = text.count("\r\n")
    crlf = 0 < ends == text.count("\n")
    return TextFile(text.replace("\r\n", "\n") if crlf else text, encoding, mark, crlf)
