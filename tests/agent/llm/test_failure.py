"""What a provider answers instead of an answer, as one of our errors."""

import msgspec
import pytest

from agent_sdk.agent.llm.failure import failure_in, failure_of, retry_after_ms
from agent_sdk.agent.llm.provider import address_of
from agent_sdk.protocol.errors import (
    ModelAnswerBroken,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelUnauthorized,
    ModelUnavailable,
)
from agent_sdk.protocol.specs import LLM

KEY = "sk-secret-0123456789"
OPENAI = address_of(LLM(model="openai/gpt-5.5", api_key=KEY))
ANTHROPIC = address_of(LLM(model="anthropic/claude-sonnet-5", api_key=KEY))
NOW = 1_784_000_000.0


def failure(status: int, body: object = b"", **headers: str) -> ModelError:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return failure_of(status, named, raw, OPENAI)


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, ModelRefused),
        (401, ModelUnauthorized),
        (402, ModelRefused),
        (403, ModelUnauthorized),
        (404, ModelRefused),
        (408, ModelUnavailable),
        (409, ModelUnavailable),
        (413, ModelRefused),
        (422, ModelRefused),
        (425, ModelUnavailable),
        (429, ModelRateLimited),
        (500, ModelUnavailable),
        (502, ModelUnavailable),
        (503, ModelUnavailable),
        (529, ModelUnavailable),
        (204, ModelAnswerBroken),
        (302, ModelRefused),
    ],
)
def test_the_status_says_which_error_it_is(status: int, kind: type[ModelError]):
    error = failure(status)
    assert type(error) is kind
    assert error.details["status"] == status
    assert error.details["provider"] == "openai"


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "context too long", "type": "invalid_request_error"}},
        {"type": "error", "error": {"type": "x", "message": "context too long"}},
        [{"error": {"code": 400, "message": "context too long"}}],
        {"error": "context too long"},
        {"message": "context too long"},
        {"detail": [{"loc": ["body"], "msg": "context too long"}]},
        {"error": True, "message": "context too long"},
        b"context too long",
        b'{"error": {"message": "context too long',
    ],
)
def test_the_reason_is_found_in_every_shape(body: object):
    assert "context too long" in failure(400, body).message


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"null", b"\xff\xfe\x00", b"[" * 100_000, {"error": {"code": 7}}]
)
def test_a_body_without_a_reason_is_an_error_all_the_same(body: object):
    assert failure(400, body).message.startswith("openai answered with HTTP 400: ")


def test_a_page_is_not_quoted():
    message = failure(502, b"<html><body>Bad Gateway</body></html>").message
    assert "web page" in message
    assert "<" not in message


def test_the_message_is_cut_and_on_one_line():
    message = failure(400, {"error": {"message": "a\r\n\x1b[31m" + "b" * 5000}}).message
    assert len(message) < 560
    assert message.isprintable()


@pytest.mark.parametrize("place", ["at the start", "over the cut", "in bytes"])
def test_the_key_is_never_in_the_message(place: str):
    said = {"at the start": f"bad key {KEY}", "over the cut": "x" * 485 + KEY + "y" * 99, "in bytes": KEY}[
        place
    ]
    body = said.encode() if place == "in bytes" else {"error": {"message": said}}
    error = failure(401, body)
    assert not any(KEY[:length] in error.message for length in range(6, len(KEY)))


def test_a_missing_key_is_named_as_the_likely_reason():
    error = failure_of(401, {}, b"", address_of(LLM(model="openai/gpt-5.5")))
    assert "no API key is set" in error.message


def test_an_unknown_path_hints_at_the_base_url():
    assert "/v1" in failure(404).message


@pytest.mark.parametrize(
    "header, milliseconds",
    [
        ("17", 17_000),
        ("0.5", 500),
        (" 2 ", 2_000),
        ("99999999", 600_000),
        ("1e999", 600_000),
        ("Tue, 14 Jul 2026 03:34:00 GMT", 40_000),
        ("Tue, 14 Jul 2099 03:34:00 GMT", 600_000),
        ("0", None),
        ("-5", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("Tue, 14 Jul 2020 03:34:00 GMT", None),
        ("Tue, 99 Jul 9999999999 03:34:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_at_most_ten_minutes(
    header: str | None, milliseconds: int | None
):
    assert retry_after_ms(header, now=NOW) == milliseconds


def test_the_exact_header_wins():
    assert retry_after_ms("2", "1250") == 1250


def test_only_errors_worth_repeating_carry_the_pause():
    assert failure(503, Retry_After="3").retry_after_ms == 3000
    assert failure(400, Retry_After="3").retry_after_ms is None


@pytest.mark.parametrize(
    "error, kind",
    [
        (b'{"code": 429, "message": "m"}', ModelRateLimited),
        (b'{"code": 502, "message": "m"}', ModelUnavailable),
        (b'{"code": 400, "message": "m"}', ModelRefused),
        (b'{"code": 200, "message": "m"}', ModelAnswerBroken),
        (b'{"code": "429", "message": "m"}', ModelRateLimited),
        (b'{"type": "overloaded_error", "message": "m"}', ModelUnavailable),
        (b'{"error": {"code": 503, "message": "m"}}', ModelUnavailable),
        (b'"m"', ModelAnswerBroken),
    ],
)
def test_an_error_within_an_answer_counts_by_its_code(error: bytes, kind: type[ModelError]):
    found = failure_in(error, OPENAI)
    assert type(found) is kind
    assert found.message.endswith(": m")


@pytest.mark.parametrize(
    "word, kind",
    [
        ("overloaded_error", ModelUnavailable),
        ("api_error", ModelUnavailable),
        ("rate_limit_error", ModelRateLimited),
        ("invalid_request_error", ModelRefused),
        ("authentication_error", ModelUnauthorized),
        ("new_error", ModelAnswerBroken),
    ],
)
def test_an_error_event_of_anthropic_counts_by_its_type(word: str, kind: type[ModelError]):
    error = msgspec.json.encode({"type": word, "message": "m"})
    assert type(failure_in(error, ANTHROPIC)) is kind


@pytest.mark.parametrize("raw", [b"", b"\xff", b"{", b"[" * 100_000])
def test_an_unreadable_error_is_a_broken_answer(raw: bytes):
    assert type(failure_in(raw, ANTHROPIC)) is ModelAnswerBroken
