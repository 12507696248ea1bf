"""Text files keep what is not changed: encoding, byte order mark, line ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.agent.tools.file_editor import decode_text, encode_text
from agent_sdk.protocol.errors import ToolError


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"plain\n",
        "grün\n".encode(),
        "grün\n".encode("latin-1"),
        b"\xef\xbb\xbfwith a mark\n",
        b"\xff\xfe" + "wide\r\n".encode("utf-16-le"),
        b"\xfe\xff" + "wide\n".encode("utf-16-be"),
        b"dos\r\nlines\r\n",
        b"mixed\r\nlines\n",
        b"old\rmac\r",
        b"no end",
    ],
)
def test_a_text_comes_back_as_it_was(data):
    file = decode_text(data)
    assert encode_text(file, file.text) == data


@pytest.mark.parametrize(
    "data", [b"\x7fELF\x02\x01\x00", b"GIF89a\x00", bytes(range(1, 32)) * 10, b"\xff\xfe\x00"]
)
def test_what_is_no_text_is_recognised(data):
    assert decode_text(data) is None


def test_a_file_with_crlf_throughout_is_edited_with_plain_newlines():
    file = decode_text(b"a\r\nb\r\n")
    assert file.text == "a\nb\n"
    assert encode_text(file, "a\nnew\nb\n") == b"a\r\nnew\r\nb\r\n"


def test_the_end_of_the_last_line_begins_no_further_line():
    assert decode_text(b"a\nb\n").lines == ["a", "b"]
    assert decode_text(b"a\nb").lines == ["a", "b"]
    assert decode_text(b"").lines == []


def test_a_character_the_encoding_does_not_have_is_named():
    file = decode_text("grün".encode("latin-1"))
    with pytest.raises(ToolError, match="latin-1.*'€'"):
        encode_text(file, "5 €")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_text_that_comes_back_or_no_text(data):
    file = decode_text(data)
    assert file is None or encode_text(file, file.text) == data
