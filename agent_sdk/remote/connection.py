"""One connection to a server or a box: its address and key, checked; reaching it; and in one sentence why that failed.

It owns the Peer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from ssl import SSLContext
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Raw, Struct

from agent_sdk.ids import checked_new_conversation
from agent_sdk.outbound import TLS_THERE, failure, proxy_for, speaks_tls, tls_problem, trusted
from agent_sdk.protocol.checks import whole
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
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize, Initialized
from agent_sdk.protocol.methods.method import Method
from agent_sdk.protocol.specs import PROTOCOL_VERSION, SUBPROTOCOL, Limits, WorkspaceSpec
from agent_sdk.rpc.peer import Handler, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.rpc.unix import connect_unix
from agent_sdk.version import __version__

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.client_proto import ResponseHandler

OnNotice = Callable[[str, Raw], None]
HEARTBEAT_SECONDS = 20.0
ANSWER_SECONDS = 30.0
"""For the upgrade, and again for the answer to `initialize`."""
SWITCHING = 101
CLIENT = ClientInfo(name="agent-sdk", version=__version__)


class Connection:
    """An initialised connection."""

    def __init__(self, peer: Peer, answer: Initialized) -> None:
        self.peer = peer
        self.answer = answer

    @property
    def conversation(self) -> str | None:
        """Id of the conversation it is bound to; None on a box."""
        return self.answer.conversation


@asynccontextmanager
async def connect(
    url: str,
    api_key: str | None = None,
    *,
    ssl: SSLContext | None = None,
    direct: bool = False,
    conversation: str = "new",
    workspace: WorkspaceSpec | None = None,
    handlers: Mapping[type[Method[Any]], Handler] | None = None,
    on_notice: OnNotice | None = None,
    new_id: str | None = None,
    heartbeat: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[Connection]:
    """Open a connection, and close it when the block ends.

    Args:
        url: `http://host:port` or `https://…` of a server, or `unix:///path` of a box.
        api_key: the key of a server, or the token of a box.
        ssl: which certificates count; None: those that this machine trusts, and SSL_CERT_FILE names.
        direct: go there without the proxy that the environment names.
        conversation: id of an existing one; `new` makes one with `workspace`.
        new_id: the id that the new one gets; repeated, it leads to the one that was made.
        heartbeat: seconds of silence after which a server is asked whether it is alive; one that does
            not answer within half of that is lost.

    Raises:
        ConnectionLost: nobody answers there, or not within 30 s.
        Unauthorized, ConversationNotFound, PolicyDenied, Overloaded: the server refuses.
        InvalidParams: the URL makes no sense.
    """
    async with AsyncExitStack() as stack:
        if urlsplit(url).scheme == "unix":
            pipe = await _reach_box(urlsplit(url).path)
        else:
            pipe = await _reach_server(
                stack, checked_url(url), checked_key(api_key), ssl, direct, conversation, heartbeat
            )
        peer = Peer(pipe, handlers or {}, opener=True, on_notice=on_notice)
        await stack.enter_async_context(peer)
        initialize = Initialize(
            protocol_version=PROTOCOL_VERSION,
            client=CLIENT,
            limits=Limits(),
            auth=api_key if url.startswith("unix:") else None,
            workspace=workspace if conversation == "new" else None,
            conversation=checked_new_conversation(new_id) if conversation == "new" else None,
        )
        try:
            answer = await peer.call(initialize, timeout=ANSWER_SECONDS)
        except InvalidParams as exc:
            raise other_version(url, exc) from None
        except Unauthorized as exc:
            raise unauthorised(url, api_key) from exc
        peer.other_limits = answer.limits
        yield Connection(peer, answer)


class _Refused(Exception):
    """Carries an error through aiohttp, which takes those that are an OSError for its own."""

    def __init__(self, error: AgentServerError) -> None:
        self.error = error


async def _reach_box(path: str) -> Pipe:
    try:
        return await connect_unix(path)
    except OSError as exc:
        raise ConnectionLost(f"no box listens on {path}: {exc.strerror or exc}") from None


async def _gone(protocol: ResponseHandler, transport: asyncio.Transport | None) -> None:
    """Close the socket of a WebSocket that has ended. With TLS, it would else wait for the other end's last word."""
    closed = protocol.closed
    if transport is not None:
        transport.abort()
    if closed is not None:
        await asyncio.wait((closed,))
        closed.exception()


async def _reach_server(
    stack: AsyncExitStack,
    url: str,
    api_key: str | None,
    ssl: SSLContext | None,
    direct: bool,
    conversation: str,
    heartbeat: float,
) -> Pipe:
    import aiohttp  # noqa: PLC0415  costs 0.3 s; local work does without

    from agent_sdk.rpc.websocket import WebSocketPipe  # noqa: PLC0415

    async def only_upgraded(
        request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Refuse every other answer while its body can be read; so no redirect is followed either."""
        answer = await send(request)
        if answer.status == SWITCHING:
            if (connection := answer.connection) is not None and connection.protocol is not None:
                stack.push_async_callback(_gone, connection.protocol, connection.transport)
            return answer
        with suppress(aiohttp.ClientError):
            body = await answer.content.read(LONGEST_BODY)
        answer.close()
        raise _Refused(refused(url, answer.status, answer.headers, body, api_key=api_key))

    session = await stack.enter_async_context(
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), middlewares=(only_upgraded,))
    )
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            socket = await session.ws_connect(
                f"{url}/v1/conversations/{conversation}",
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                protocols=(SUBPROTOCOL,),
                max_msg_size=Limits().frame_bytes,
                heartbeat=heartbeat,
                compress=0,
                autoclose=True,
                decode_text=False,
                proxy=None if direct else proxy_for(url),
                ssl=await trusted(url, ssl),
            )
    except _Refused as exc:
        raise exc.error from None
    except aiohttp.ServerDisconnectedError as exc:
        if exc.message is None or isinstance(exc.message, str):  # not a byte came
            await check_no_tls(url)
        raise unreachable(url, exc, direct=direct) from None
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise unreachable(url, exc, direct=direct) from None
    return WebSocketPipe(socket, heartbeat=heartbeat)


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
    seconds = whole(headers.get("Retry-After", ""))
    return 1000 if seconds is None else min(seconds, LONGEST_PAUSE) * 1000


EXAMPLE = "http://127.0.0.1:8000"
_KEY = re.compile(r"[\x21-\x7e]+")


def checked_url(given: str, option: str = "url", schemes: tuple[str, ...] = ("http", "https")) -> str:
    """Return the URL without spaces around it and slashes at its end.

    Raises:
        InvalidParams: it is none, or holds what does not belong there: a login, a query.
    """
    url = given.strip()
    shown = repr(url[:_SHOWN])
    starts = " or ".join(f"{scheme}://" for scheme in schemes)
    try:
        parts = urlsplit(url)
        fits = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        raise InvalidParams(f"{option} is no URL: {shown}; it looks like {EXAMPLE}") from None
    if "@" in parts.netloc:
        raise InvalidParams(f"{option} must not hold a login: it ends up in logs; pass the key as api_key")
    if not fits or re.search(r"[\x00-\x20\x7f]", url):
        raise InvalidParams(
            f"{option} must start with {starts} and name a host, like {EXAMPLE} (got {shown})"
        )
    if parts.query or parts.fragment:
        raise InvalidParams(f"{option} must end before ? and #, like {EXAMPLE} (got {shown})")
    return url.rstrip("/")


def checked_address(given: str) -> str:
    """Return the URL of a server, or of a box: `unix:///path`.

    Raises:
        InvalidParams: it is none.
    """
    if given.startswith("unix:///"):
        return given
    return checked_url(given, schemes=("http", "https", "unix"))


def checked_key(given: str | None, option: str = "api_key") -> str | None:
    """Return the key without the spaces and line ends around it, which files and variables often have.

    Raises:
        InvalidParams: it holds what no key has.
    """
    key = (given or "").strip()
    if key and not _KEY.fullmatch(key):
        raise InvalidParams(
            f"{option} must be printable ASCII characters without spaces or line ends; "
            f"the one that was given has something else among its {len(key)}"
        )
    return key or None


def checked_trust(given: SSLContext | None) -> SSLContext | None:
    """Return the certificates that count.

    Raises:
        InvalidParams: it is no SSLContext; a connection without checks would give the key to anybody.
    """
    if given is not None and not isinstance(given, SSLContext):
        raise InvalidParams(
            "ssl must be an ssl.SSLContext, e.g. ssl.create_default_context(cafile='ca.pem') for a CA of your own "
            f"(got {given!r})"
        )
    return given
