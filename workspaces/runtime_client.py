"""The calls of a Runtime API, and what it says in answer: sessions as they are, failures in one sentence.

The key goes to the address that was given and nowhere else: a redirect is not followed, but told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from msgspec import Struct

from agent_sdk.outbound import failure, proxy_for, tls_problem, trusted
from agent_sdk.protocol.checks import whole
from agent_sdk.protocol.errors import InvalidParams, RemoteApiError
from agent_sdk.remote.connection import checked_key, checked_trust, checked_url

if TYPE_CHECKING:
    import aiohttp

logger = logging.getLogger("workspaces")

UNREADABLE = (ValueError, RecursionError)
"""What decoding JSON may raise."""
LONGEST_ANSWER = 4 << 20
LONGEST_SENTENCE = 300
LONGEST_RETRY_AFTER = 60
CONNECT_SECONDS = 10.0
PASSING = frozenset({408, 425, 429})
"""Statuses below 500 after which the same request may succeed."""


class Session(Struct, frozen=True, kw_only=True):
    """What a Runtime API tells of a session."""

    runtime_id: str
    url: str
    """Of the runtime."""
    api_key: str | None
    """Of the runtime."""
    status: str
    """`running`, `paused`, or anything else."""
    pod_status: str
    problem: str
    """Everything it says of what went wrong; empty when it says nothing."""

    def __repr__(self) -> str:
        return f"<Session {self.runtime_id} {self.status}, {self.pod_status}>"


class RuntimeClient:
    """The calls of a Runtime API. `async with` opens it."""

    def __init__(self, url: str, key: str, *, timeout: float, ssl: SSLContext | None = None) -> None:
        """Describe it.

        Args:
            url: where the Runtime API is.
            key: sent as X-API-Key.
            timeout: seconds for one call.
            ssl: which certificates count; None: those that this machine trusts, or that SSL_CERT_FILE names.

        Raises:
            InvalidParams: the URL or the key makes no sense.
        """
        self.url = checked_url(url, "runtime_api_url")
        sent = checked_key(key, "runtime_api_key")
        if sent is None:
            raise InvalidParams("runtime_api_key is empty; pass the key that the Runtime API gave you")
        self.has_answered = False
        """Whether there is a Runtime API, as far as anybody has seen."""
        self._headers = {"X-API-Key": sent}
        self._ssl = checked_trust(ssl)
        self._trusted: SSLContext | bool | None = None
        self._timeout = timeout
        self._http: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<RuntimeClient {self.url}>"

    async def __aenter__(self) -> Self:
        import aiohttp  # noqa: PLC0415  costs 0.3 s; local work does without

        self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._http is not None
        await self._http.close()

    async def session(self, id: str, *, wait: float = 0.0) -> Session | None:
        """Return a session; None: there is none.

        Args:
            id: its id.
            wait: seconds after which the answer is wanted at the latest while its runtime is about to start; one
                that does not know of this answers at once.

        Raises:
            RemoteApiError: the Runtime API refuses, or does not answer in time.
        """
        suffix = f"?wait={wait:g}" if wait else ""
        try:
            return _session(await self.call("GET", f"/sessions/{quote(id, safe='')}{suffix}", None, "attach"))
        except RemoteApiError as exc:
            if exc.details.get("status") == 404:
                return None
            raise

    async def start(self, body: Mapping[str, Any], *, timeout: float) -> Session:
        """Start a runtime, or learn which one the session has.

        Raises:
            RemoteApiError: the Runtime API refuses, or does not answer in time.
        """
        session = _session(await self.call("POST", "/start", body, "start", timeout))
        if not session.runtime_id or not session.url:
            missing = "url" if session.runtime_id else "runtime_id"
            raise RemoteApiError(
                f"{self.url} started a runtime and says no {missing}", phase="start", status=200
            )
        return session

    async def verb(self, name: str, runtime_id: str, *, timeout: float) -> None:
        """Ask to `resume`, `pause` or `stop` a runtime.

        Raises:
            RemoteApiError: the Runtime API refuses, or does not answer in time.
        """
        await self.call("POST", f"/{name}", {"runtime_id": runtime_id}, name, timeout)

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        phase: str,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Make one call; returns the object it answers, empty where it answers nothing.

        Raises:
            RemoteApiError: it refuses, fails, cannot be reached, or is no Runtime API; details: status, phase,
                retry_after_ms.
        """
        import aiohttp  # noqa: PLC0415

        assert self._http is not None
        seconds = self._timeout if timeout is None else timeout
        try:
            async with self._http.request(
                method,
                f"{self.url}{path}",
                json=body,
                headers=self._headers,
                allow_redirects=False,
                proxy=proxy_for(self.url),
                ssl=await self._trust(),
                timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS),
            ) as answer:
                text = await _text(answer.content)
        except TimeoutError:
            raise RemoteApiError(
                f"{self.url} did not answer within {seconds:g} s", phase=phase, unanswered=True
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            # What is wrong with the encryption does not get better by trying again.
            details = {} if tls_problem(exc, self.url) else {"unanswered": True}
            raise RemoteApiError(
                f"cannot reach the Runtime API {self.url}: {failure(exc, self.url)}", phase=phase, **details
            ) from None
        self.has_answered = True
        if 200 <= answer.status < 300:
            return self._object(text, answer.status, phase)
        raise self._refused(answer.status, answer.headers, text, phase)

    async def _trust(self) -> SSLContext | bool:
        if self._trusted is None:
            self._trusted = await trusted(self.url, self._ssl)
        return self._trusted

    def _object(self, text: str, status: int, phase: str) -> dict[str, Any]:
        if not text.strip():
            return {}
        try:
            value = json.loads(text)
        except UNREADABLE:
            value = None
        if not isinstance(value, dict):
            raise RemoteApiError(
                f"{self.url} is no Runtime API: it answers {_short(text)!r}", phase=phase, status=status
            )
        return value

    def _refused(self, status: int, headers: Mapping[str, str], text: str, phase: str) -> RemoteApiError:
        if 300 <= status < 400:
            place = headers.get("Location", "elsewhere")[:LONGEST_SENTENCE]
            said = f"it redirects to {place}; the key is not sent there: if it is right, pass that address"
        else:
            said = _sentence(text) or "it says no more"
        after = whole(headers.get("Retry-After", ""))
        details = {} if after is None else {"retry_after_ms": min(after, LONGEST_RETRY_AFTER) * 1000}
        hint = "; pass the right runtime_api_key" if status == 401 else ""
        return RemoteApiError(
            f"{self.url} answered {status} to {phase}: {said}{hint}", phase=phase, status=status, **details
        )


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: nobody answered, it was too much, or the other end failed."""
    if not isinstance(error, RemoteApiError):
        return False
    status = error.details.get("status")
    return "unanswered" in error.details or (isinstance(status, int) and (status in PASSING or status >= 500))


async def _text(content: aiohttp.StreamReader) -> str:
    read = bytearray()
    async for piece in content.iter_any():
        read += piece
        if len(read) > LONGEST_ANSWER:
            raise ValueError(f"its answer is longer than {LONGEST_ANSWER} bytes")
    return read.decode(errors="replace")


def _session(answer: Mapping[str, Any]) -> Session:
    def text(*names: str) -> str:
        return next((value for name in names if isinstance(value := answer.get(name), str) and value), "")

    return Session(
        runtime_id=text("runtime_id", "id"),
        url=text("url").rstrip("/"),
        api_key=text("session_api_key") or None,
        status=text("status").lower(),
        pod_status=text("pod_status").lower(),
        problem=_problem(answer),
    )


def _problem(answer: Mapping[str, Any]) -> str:
    """What it says of events, restarts and logs, as one line, the end of the logs last."""
    found = []
    for name in ("events", "restart_reasons"):
        value = answer.get(name)
        if isinstance(value, list):
            found += [item if isinstance(item, str) else json.dumps(item) for item in value]
    logs = answer.get("pod_logs")
    if isinstance(logs, str):
        found += [line.strip() for line in logs.splitlines()[-20:] if line.strip()]
    return " | ".join(found)


def _sentence(text: str) -> str:
    """What a refusal says, whatever form it has."""
    try:
        value = json.loads(text)
    except UNREADABLE:
        return _short(text)
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return _short(value if isinstance(value, str) else json.dumps(value))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"{line[:LONGEST_SENTENCE]}…" if len(line) > LONGEST_SENTENCE else line
