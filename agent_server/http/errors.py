"""JSON answers over plain HTTP, errors included: the same error object as on the WebSocket, plus a status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from agent_sdk.protocol.errors import (
    AgentServerError,
    Conflict,
    ErrorObject,
    HostNotAllowed,
    InvalidParams,
    InvalidRequest,
    LimitExceeded,
    MethodNotFound,
    NotFound,
    NotInitialised,
    Overloaded,
    ParseError,
    PolicyDenied,
    TimedOut,
    Unauthorized,
    WorkspaceUnavailable,
    to_wire,
)

_STATUS: tuple[tuple[type[AgentServerError], int], ...] = (
    (HostNotAllowed, 421),
    (Unauthorized, 401),
    (PolicyDenied, 403),
    (NotFound, 404),
    (MethodNotFound, 404),
    (Conflict, 409),
    (LimitExceeded, 413),
    (Overloaded, 429),
    (WorkspaceUnavailable, 503),
    (TimedOut, 504),
    (ParseError, 400),
    (InvalidRequest, 400),
    (InvalidParams, 400),
    (NotInitialised, 400),
)
_KINDS = {
    HTTPStatus.NOT_FOUND: (-32004, "not_found"),
    HTTPStatus.METHOD_NOT_ALLOWED: (-32601, "method_not_allowed"),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (-32006, "limit_exceeded"),
    HTTPStatus.UPGRADE_REQUIRED: (-32600, "upgrade_required"),
    HTTPStatus.REQUEST_TIMEOUT: (-32007, "timed_out"),
    HTTPStatus.SERVICE_UNAVAILABLE: (-32001, "overloaded"),
    HTTPStatus.INTERNAL_SERVER_ERROR: (-32603, "internal_error"),
}


def as_json(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a value as a JSON answer."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )


def refusal(error: AgentServerError) -> web.Response:
    """Return an exception as an answer. `status` and `headers` in its details are for HTTP alone."""
    draining = error.details.get("reason") == "draining"
    status = error.details.pop("status", None) or (503 if draining else status_of(type(error)))
    headers = dict(error.details.pop("headers", {}))
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="agent-server"'
    return as_json({"error": to_wire(error)}, status=status, headers=headers)


def http_error(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return an answer for what HTTP itself refuses."""
    code, kind = _KINDS.get(HTTPStatus(status), (-32600, "invalid_request"))
    error = ErrorObject(code, message, {"kind": kind, "retryable": status in (408, 503)})
    return as_json({"error": error}, status=status, headers=headers)


def status_of(kind: type[AgentServerError]) -> int:
    """Return the status of the answer to a request that fails like this."""
    return next((status for group, status in _STATUS if issubclass(kind, group)), 500)
