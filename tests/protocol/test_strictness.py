"""Nesting and repeated keys, compared with a slow and obvious way to count them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_sdk.protocol.codec import check_depth, repeats_a_member
from agent_sdk.protocol.errors import MaxDepth
from tests.protocol.examples import JSON

keys = st.sampled_from(["id", "method", "params", "x", "", '"id"', "i\\d", "{[", "é"])
pairs = st.lists(st.tuples(keys, JSON | st.dictionaries(keys, JSON, max_size=3)), max_size=6)


def written(members, escape):
    def text(value):
        return json.dumps(value, ensure_ascii=escape)

    return ("{" + ",".join(f"{text(key)}: {text(value)}" for key, value in members) + "}").encode()


def depth_of(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(value=JSON | st.dictionaries(keys, JSON), limit=st.integers(0, 8))
def test_exactly_what_is_nested_deeper_is_refused(value, limit):
    text = json.dumps(value).encode()
    if depth_of(value) > limit:
        with pytest.raises(MaxDepth):
            check_depth(text, limit)
    else:
        check_depth(text, limit)


@given(members=pairs, escape=st.booleans())
def test_exactly_an_object_that_repeats_a_key_of_the_envelope_is_noticed(members, escape):
    names = [key for key, _ in members]
    repeats = any(names.count(name) > 1 for name in ("id", "method", "params"))
    assert repeats <= repeats_a_member(written(members, escape)) <= (len(set(names)) < len(names))


def test_a_key_is_the_same_key_however_it_is_spelt():
    assert repeats_a_member(rb'{"id":1,"\u0069d":2}')
    assert repeats_a_member(rb'{"i\u0064":1,"\u0069d":2}')
    assert not repeats_a_member(rb'{"id":1,"\u0069e":2}')


def test_brackets_in_text_do_not_count():
    check_depth(json.dumps({"text": "[" * 1000 + '\\"' + "{" * 1000}).encode(), 2)


def test_a_wide_object_is_no_deep_object():
    check_depth(json.dumps([[{}] * 1000] * 100).encode(), 3)


@pytest.mark.parametrize("part", [b"[" * 10, b'{"a":', b"[]", b"][", b"[][", b'"', b"\\[", b'"\\['])
def test_hostile_megabytes_are_looked_at_in_one_go(part):
    text = part * 1_000_000
    try:
        check_depth(text, 64)
    except MaxDepth:
        assert text.count(b"[") + text.count(b"{") > 64
