"""Why a server, or whatever answers at its address, does not let a client in: each in one sentence with the mend."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from agent_sdk.outbound import TLS_THERE, failure, speaks_tls, tls_problem
from agent_sdk.protocol.errors import (
    AgentServerError,
    ConnectionLost,
    ConversationNotFound,
    ErrorObject,
    InvalidParams,
    NotFound,
    Overloaded,
    PolicyDenied,
    Unauthorized,
    from_wire,
)
from agent_sdk.protocol.specs import PROTOCOL_VERSION
from agent_sdk.version import __version__

LONGEST_BODY = 64 << 10
LONGEST_PAUSE = 60
_SHOWN = 200
_BUSY = {429: "refuses further connections for now", 503: "is shutting down"}
_UPGRADE = (
    "a proxy there does not pass on WebSockets; have it pass the headers Upgrade and Connection "
    "(nginx: proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;)"
)


class _Body(Struct):
    error: ErrorObject


def refused(
    url: str, status: int, headers: Mapping[str, str], body: bytes, *, api_key: str | None
) -> AgentServerError:
    """Return what to tell of an answer that is none of those that were asked for.

    Args:
        url: of the server, as users wrote it.
        status, headers, body: of the answer; the body may be cut.
        api_key: what was sent.
    """
    said = _said(body)
    if status in _BUSY:
        problem = f"{url} {_BUSY[status]}" if said is None else f"{url}: {said.message}"
        return Overloaded(problem, retry_after_ms=_pause(headers))
    if status == 401:
        return unauthorised(url, api_key)
    if said is None and status in (403, 421):
        return PolicyDenied(f"{url} refuses this client: it answered {_named(status)}")
    if 300 <= status < 400:
        place = headers.get("Location", "elsewhere")[:_SHOWN]
        return _stranger(
            url, status, f"redirects to {place}, where the key is not sent; if it is right, pass that URL"
        )
    if status == 426 or (said is not None and "Upgrade: websocket" in said.message):
        return _stranger(url, status, f"takes no WebSocket: {_UPGRADE}")
    if said is not None:
        return _of_ours(url, status, said)
    if status >= 500:
        return ConnectionLost(f"{url} cannot be reached for now: it answered {_named(status)}")
    if tls_problem(Exception(body.decode(errors="replace")), url) is not None:
        return ConnectionLost(f"cannot connect to {url}: {TLS_THERE}", tls=True)
    return _stranger(url, status, f"is no agent server: it answered {_named(status)}{_hint(url)}")


def unauthorised(url: str, api_key: str | None) -> Unauthorized:
    """Return what to tell whose key a server does not accept, or who has none."""
    if not api_key:
        return Unauthorized(f"{url}: an API key is needed, and none was given")
    return Unauthorized(
        f"{url} does not accept the API key; `agent-server serve` says at its start where the right one is"
    )


def unreachable(url: str, exc: Exception, *, direct: bool = False) -> ConnectionLost:
    """Return what there is to say when nobody answers at an address; `direct`: without a proxy."""
    reason = failure(exc, url, direct=direct)
    if (problem := tls_problem(exc, url)) is not None:
        option = ", or pass ssl=" if "SSL_CERT_FILE" in problem else ""
        return ConnectionLost(f"cannot connect to {url}: {problem}{option}", tls=True)
    if getattr(exc, "status", 0) and type(exc).__name__ == "ClientHttpProxyError":
        return ConnectionLost(f"cannot reach {url}: {reason}", status=exc.status)  # type: ignore[attr-defined]
    return ConnectionLost(f"cannot reach {url}: {reason}; is the server running there?")


async def check_no_tls(url: str) -> None:
    """Check that a server that ended a plain connection without a word is not one that waits for TLS.

    Raises:
        ConnectionLost: it is.
    """
    if await speaks_tls(url):
        raise ConnectionLost(f"cannot connect to {url}: {TLS_THERE}", tls=True)


def other_version(url: str, refusal: InvalidParams) -> InvalidParams:
    """Return what to tell when `initialize`, which is always well-formed, makes no sense to a server."""
    message, supported = refusal.message, refusal.details.get("supported")
    if "older one" in message:  # it says so itself
        return InvalidParams(f"{url}: {message}", **refusal.details)
    us = f"this client (agent-sdk {__version__})"
    if isinstance(supported, list) and supported and all(isinstance(version, int) for version in supported):
        older = "server" if max(supported) < PROTOCOL_VERSION else "client"
        other = f"speaks version {max(supported)} of the protocol, {us} {PROTOCOL_VERSION}"
    elif "unknown field" in message:
        older, other = "server", f"does not know what {us} asks for"
    else:
        return refusal
    return InvalidParams(
        f"{url} {other}: the {older} is the older one, update it ({message})", **refusal.details
    )


def _of_ours(url: str, status: int, error: ErrorObject) -> AgentServerError:
    refusal = from_wire(error)
    if status >= 500:
        return ConnectionLost(f"{url} cannot be reached for now: {error.message}")
    message = f"{url}: {error.message}"
    if isinstance(refusal, ConversationNotFound):
        message = f"{url}: no such conversation"
    if type(refusal) is NotFound and error.message == HTTPStatus(404).phrase:
        message = nowhere(url)
    return type(refusal)(message, **refusal.details)


def nowhere(url: str) -> str:
    """Return what to tell whose URL leads to a server, and there to nothing."""
    return f"{url} leads nowhere on the agent server there{_hint(url)}"


def _stranger(url: str, status: int, what: str) -> ConnectionLost:
    return ConnectionLost(f"{url} {what}", status=status)


def _hint(url: str) -> str:
    path = urlsplit(url).path.rstrip("/")
    if path.endswith("/v1"):
        return "; leave out /v1 at the end of the URL"
    return f"; is its path {path} right?" if path else "; is it the right host and port?"


def _said(body: bytes) -> ErrorObject | None:
    """The error object of an agent server; None: somebody else answered."""
    try:
        error = msgspec.json.decode(body, type=_Body).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return error if isinstance(error.data.get("kind"), str) else None


def _named(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _pause(headers: Mapping[str, str]) -> int:
    seconds = headers.get("Retry-After", "1")
    return min(int(seconds), LONGEST_PAUSE) * 1000 if seconds.isdecimal() and len(seconds) < 10 else 1000
