"""What went wrong with a model, as one of our errors: from an HTTP status, an error object, a broken answer.

Messages are for people and end up in the log: at most 500 characters of what the provider said, and
never the key.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import msgspec

from agent_sdk.agent.llm.decoding import decode_json, encode_json, json_value
from agent_sdk.agent.llm.provider import Address
from agent_sdk.agent.mask import shortened
from agent_sdk.protocol.errors import (
    ModelAnswerBroken,
    ModelAnswerTooLarge,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelUnauthorized,
    ModelUnavailable,
)
from agent_sdk.protocol.specs import Json

T = TypeVar("T")

LONGEST_PAUSE = 600.0
"""Seconds; a provider that asks for more is asked again after that."""

ERROR_BYTES = 64 << 10
"""As much of an error's body is read."""

_MESSAGE_CHARACTERS = 500
_LOOKED_AT = 4096

_WORDS = (
    "error",
    "message",
    "error_message",
    "errorMessage",
    "error_msg",
    "err_msg",
    "errors",
    "detail",
    "details",
    "msg",
    "reason",
    "base_resp",
    "status_msg",
)
"""Where providers put what they have to say, the likeliest first."""

_BY_STATUS: dict[int, type[ModelError]] = {
    401: ModelUnauthorized,
    403: ModelUnauthorized,
    408: ModelUnavailable,
    409: ModelUnavailable,
    425: ModelUnavailable,
    429: ModelRateLimited,
}

_BY_TYPE: dict[str, type[ModelError]] = {
    "authentication_error": ModelUnauthorized,
    "permission_error": ModelUnauthorized,
    "invalid_request_error": ModelRefused,
    "not_found_error": ModelRefused,
    "request_too_large": ModelRefused,
    "billing_error": ModelRefused,
    "rate_limit_error": ModelRateLimited,
    "api_error": ModelUnavailable,
    "timeout_error": ModelUnavailable,
    "overloaded_error": ModelUnavailable,
}
"""Anthropic's error types, which also come in the middle of an answer."""


def failure_of(status: int, headers: Mapping[str, str], body: bytes, address: Address) -> ModelError:
    """Return the error for an answer whose status is not 200. The body may be anything, and cut."""
    details: dict[str, Any] = {"status": status, "provider": address.provider}
    if 300 <= status < 400:
        said = "it answers with a redirect, which is not followed; set base_url to the final address"
        return ModelRefused(f"{address.host} refused the request: {said}", **details)
    said = shown(_message(body), address)
    cls = _BY_STATUS.get(status) or (ModelUnavailable if status >= 500 else ModelRefused)
    if status < 300:
        cls = ModelAnswerBroken
    pause = retry_after_ms(headers.get("Retry-After"), headers.get("retry-after-ms"), time.time())
    if pause is not None and cls.retryable:
        details["retry_after_ms"] = pause
    hint = ""
    if status == 404:
        hint = " (is the model's name right, and does base_url end with the version, such as /v1?)"
    elif cls is ModelUnauthorized and not address.sends_key:
        hint = " (no API key is set)"
    return cls(
        f"{address.provider} answered with HTTP {status}: {said or 'no reason given'}{hint}", **details
    )


def failure_in(raw: bytes | Json, address: Address) -> ModelError:
    """Return the error for JSON in an answer with status 200 that is, or holds, an error object.

    A number that is an HTTP status, or one of Anthropic's types, says which; anything else means a
    broken answer.
    """
    details: dict[str, Any] = {"provider": address.provider}
    error = json_value(raw) if isinstance(raw, bytes) else raw
    members = _innermost(error)
    code, kind = _code(members), members.get("type")
    cls: type[ModelError] = ModelAnswerBroken
    if code is not None:
        details["status"] = code
        cls = _BY_STATUS.get(code) or (ModelUnavailable if code >= 500 else ModelRefused)
    elif isinstance(kind, str):
        cls = _BY_TYPE.get(kind, ModelAnswerBroken)
    said = shown(_said(error), address)
    return cls(f"{address.provider} stopped with an error: {said or 'no reason given'}", **details)


def broken(reason: str, address: Address, **details: Any) -> ModelAnswerBroken:
    """Return the error for an answer that stopped or makes no sense."""
    message = f"the answer of {address.provider} {shown(reason, address)}"
    return ModelAnswerBroken(message, provider=address.provider, **details)


def too_large(limit: int, what: str, address: Address) -> ModelAnswerTooLarge:
    """Return the error for an answer that has more than `limit` of something."""
    message = f"the answer of {address.provider} has more than {limit} {what}"
    return ModelAnswerTooLarge(message, provider=address.provider, limit=limit)


def decoded(decoder: msgspec.json.Decoder[T], data: bytes, address: Address) -> T:
    """Return a piece of an answer.

    Raises:
        ModelAnswerBroken: it is not what the decoder takes; the message shows its beginning.
    """
    try:
        return decode_json(decoder, data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise broken(f"cannot be read ({exc}): {beginning(data, address)}", address) from None


def shown(text: str, address: Address, limit: int = _MESSAGE_CHARACTERS) -> str:
    """Text that may be shown: without secrets and control characters, on one line, cut."""
    for secret in address.secrets:  # before the cut: half a key is too much
        text = text.replace(secret, "***")
    start = shortened(text, _LOOKED_AT)
    return shortened(" ".join("".join(c if c.isprintable() else " " for c in start).split()), limit)


def beginning(data: bytes, address: Address) -> str:
    """The first words of what is no answer, as they may be shown."""
    return shown(data[:_LOOKED_AT].decode(errors="replace"), address, 200)


def retry_after_ms(header: str | None, milliseconds: str | None = None, now: float = 0.0) -> int | None:
    """How long the provider wants to be left alone, at most 10 minutes; None when it does not say or it is over.

    Args:
        header: `Retry-After`: seconds, or an HTTP date (RFC 9110, section 10.2.3).
        milliseconds: `retry-after-ms`, more exact, as OpenAI sends it.
        now: seconds since the Unix epoch, which a date is compared with.
    """
    seconds = _number(milliseconds, 0.001)
    if seconds is None:
        seconds = _number(header, 1.0)
    if seconds is None and header:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return None
    if seconds is None or not seconds > 0:  # also NaN
        return None
    return max(1, round(min(seconds, LONGEST_PAUSE) * 1000))


def _number(text: str | None, unit: float) -> float | None:
    try:
        return float(text or "") * unit
    except ValueError:
        return None


def _message(body: bytes) -> str:
    """The reason in an error's body: the `message` of the shapes in use, or the text itself unless it is a page."""
    if said := _said(json_value(body)):
        return said
    text = body.decode(errors="replace").strip()
    return "a web page instead of an answer" if text[:1] == "<" else text


def says_something(data: bytes) -> bool:
    """Whether this is JSON with a sentence for people in it, in one of the shapes in use."""
    said = json_value(data)
    if isinstance(said, list) and said:
        said = said[0]
    return isinstance(said, dict) and any(said.get(word) for word in _WORDS)


def _innermost(error: object) -> dict[str, Any]:
    """The error object itself, out of `{"error": {…}}` and `[{…}]`."""
    for _ in range(4):
        if isinstance(error, list) and error:
            error = error[0]
        elif isinstance(error, dict) and isinstance(error.get("error"), dict | list):
            error = error["error"]
        else:
            break
    return error if isinstance(error, dict) else {}


def _code(members: Mapping[str, Any]) -> int | None:
    """The HTTP status that an error object names."""
    for name in ("code", "status", "status_code"):
        code = members.get(name)
        if isinstance(code, str) and code.isdecimal() and len(code) == 3:
            code = int(code)
        if isinstance(code, int) and 400 <= code < 600:
            return code
    return None


def _said(error: object) -> str:
    """The text of `{"error": {"message": …}}`, `[{…}]`, `{"message": …}`, `{"detail": …}` and the like."""
    for _ in range(4):
        if isinstance(error, list) and error:
            error = error[0]
        elif isinstance(error, dict):
            inner = next((error[word] for word in _WORDS if error.get(word)), None)
            if inner is None:
                break
            behind = error.get("metadata")
            if isinstance(inner, str) and isinstance(behind, dict) and isinstance(behind.get("raw"), str):
                return f"{inner}: {_message(behind['raw'].encode(errors='replace'))}"  # OpenRouter's provider
            error = inner
        else:
            break
    if isinstance(error, str):
        return error
    return encode_json(error).decode() if isinstance(error, dict | list) and error else ""
