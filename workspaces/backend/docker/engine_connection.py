"""The connection to a container engine: each call with its time, repeated where that is safe, failing in our words.

Calls are made by aiodocker's objects. What they cannot do goes over aiodocker's session, by `request` and `stream`;
docs/dependencies.md says what that is. Engines tell most of their failures apart only by text, which has not changed
for years; what is not recognised is passed on as it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import aiodocker
import aiohttp
import msgspec
import tenacity

from agent_sdk.protocol.errors import (
    AgentServerError,
    EngineUnavailable,
    ImageUnavailable,
    IsolationUnavailable,
    NotFound,
    WorkspaceUnavailable,
)
from agent_sdk.workspace.environment import from_caller

OLDEST_API = (1, 40)
"""Of Docker 19.03."""
ANSWER_SECONDS = 10.0
AGAIN_SECONDS = 5.0
"""For so long a call that changes nothing is repeated when the connection is lost: longer than most engines restart."""

NO_CONNECTION = 900
"""The status that aiodocker gives a connection that was not made or was lost."""
LONGEST_TEXT = 2048

FAILURES = (
    aiodocker.DockerError,
    aiohttp.ClientError,
    OSError,  # TimeoutError, too
    ValueError,  # no JSON, no UTF-8, a line without end, or JSON that msgspec does not accept
    LookupError,  # an error without its message
    TypeError,
    RecursionError,
)
"""What a call may raise when the engine, or what pretends to be one, fails."""
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
"""What reading a file of the `docker` command may raise."""
Call = Callable[[], Awaitable[Any]]
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]*")


def plain_name(name: str) -> str:
    """Return the name of a container or a volume as a part of a path.

    Raises:
        NotFound: it would lead elsewhere in the engine's API.
    """
    if not _NAME.fullmatch(name):
        raise NotFound(f"nothing on an engine can have the name {name[:64]!r}")
    return name


class EngineConnection:
    """A connection to an engine that can be used; `docker` is aiodocker's door to it."""

    def __init__(self, url: str | None = None, *, patience: float = 1.0) -> None:
        """Say which one.

        Args:
            url: e.g. unix:///run/docker.sock; None: DOCKER_HOST, the Docker context, the usual sockets.
            patience: all limits of time are multiplied by it.
        """
        self._url = url
        self.patience = patience
        self.docker: aiodocker.Docker
        self.where: str
        """The engine's address, for people."""
        self.version: dict[str, Any]
        """What it said of its version."""

    async def __aenter__(self) -> Self:
        self.docker = self._dial()
        found, connector = self.docker.docker_host, self.docker.connector
        found = f"unix://{connector.path}" if isinstance(connector, aiohttp.UnixConnector) else found
        self.where = _named(self._url) or found
        try:
            await self._negotiate()
        except BaseException:
            await self.docker.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.docker.close()

    async def _negotiate(self) -> None:
        async with self.bounded("tell its version"):
            self.version = await self.request("GET", "version", versioned=False)
            api = str(self.version["ApiVersion"])
            number = tuple(int(part) for part in api.split("."))
        if number < OLDEST_API:
            raise EngineUnavailable(
                f"the engine at {self.where} is too old (API {api}): use Docker 19.03 (API 1.40) or newer",
                phase="engine",
            )
        self.docker.api_version = f"v{api}"

    def _dial(self) -> aiodocker.Docker:
        """Prepare connections to the engine; none is made yet."""
        try:
            return aiodocker.Docker(_named(self._url))
        except (AssertionError, ValueError, OSError, RuntimeError, aiodocker.DockerError) as exc:
            raise not_dialled(exc) from None

    @asynccontextmanager
    async def bounded(
        self, what: str, *, phase: str = "engine", seconds: float = ANSWER_SECONDS
    ) -> AsyncIterator[None]:
        """Limit the time of a block, and tell its failures in our words.

        Args:
            what: the call, as in "the engine could not {what}".
            phase: goes into the error's details.
            seconds: after which the engine counts as hanging.

        Raises:
            NotFound, EngineUnavailable, WorkspaceUnavailable, ImageUnavailable, IsolationUnavailable.
        """
        try:
            async with asyncio.timeout(seconds * self.patience):
                yield
        except AgentServerError:
            raise
        except FAILURES as exc:
            raise self._failed(exc, what, phase, seconds) from None

    async def ask(self, what: str, call: Call, *, seconds: float = ANSWER_SECONDS) -> Any:
        """Return what a call answers that may be repeated when the connection is lost."""
        async with self.bounded(what, seconds=seconds):
            return await tenacity.AsyncRetrying(**_REPEATED)(call)

    async def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        versioned: bool = True,
    ) -> Any:
        """Send a call that aiodocker has no method for, and return its decoded answer. Fails with FAILURES."""
        path = f"{self.docker.api_version}/{path}" if versioned else path
        async with await _send(self.docker, method, path, params=params, json=body) as response:
            return msgspec.json.decode(await response.read())

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        *,
        headers: Mapping[str, str] | None = None,
        what: str,
        phase: str = "engine",
        seconds: float = ANSWER_SECONDS,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Get an answer that comes bit by bit, over a connection of its own; only its begin has a limit of time.

        Raises:
            As `bounded`, also for what the reader raises inside of the block.
        """
        try:
            async with self._dial() as docker:
                async with asyncio.timeout(seconds * self.patience):
                    path = f"{self.docker.api_version}/{path}"
                    response = await _send(docker, method, path, params=params, headers=headers)
                async with response:
                    _keep_alive(response)
                    yield response
        except AgentServerError:
            raise
        except FAILURES as exc:
            raise self._failed(exc, what, phase, seconds) from None

    def _failed(self, exc: BaseException, what: str, phase: str, seconds: float) -> AgentServerError:
        return failure(exc, phase=phase, what=what, where=self.where, seconds=seconds * self.patience)


def docker_folder() -> Path:
    """Return where the `docker` command keeps what it keeps for its user."""
    given = from_caller(["DOCKER_CONFIG"]).get("DOCKER_CONFIG")
    return Path(given) if given else Path.home() / ".docker"


def _context_host() -> str | None:
    """Return the address of the current context in the folder that DOCKER_CONFIG names. Blocks.

    None: it names none, or its context is the default one; then others know better.
    """
    if not from_caller(["DOCKER_CONFIG"]).get("DOCKER_CONFIG"):
        return None
    with suppress(*UNREADABLE):
        named = from_caller(["DOCKER_CONTEXT"]).get("DOCKER_CONTEXT")
        name = named or json.loads((docker_folder() / "config.json").read_bytes()).get("currentContext")
        if name and name != "default":
            place = (
                docker_folder() / "contexts/meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
            )
            return str(json.loads(place.read_bytes())["Endpoints"]["docker"]["Host"])
    return None


def _named(url: str | None) -> str | None:
    """The address that was given, or is in the environment; None: aiodocker finds one.

    aiodocker would take the user's current context before DOCKER_HOST, unlike every other client.
    """
    return url or from_caller(["DOCKER_HOST"]).get("DOCKER_HOST") or _context_host()


async def _send(docker: aiodocker.Docker, method: str, path: str, **how: Any) -> aiohttp.ClientResponse:
    response = await docker.session.request(method, f"{docker.docker_host}/{path}", **how)
    if response.status < 400:
        return response
    async with response:
        raise aiodocker.DockerError(response.status, await response.text())


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have the kernel end a connection over which nothing comes because the other machine is gone, in 30 s."""
    transport = response.connection.transport if response.connection is not None else None
    connected = transport.get_extra_info("socket") if transport is not None else None
    if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


_KNOWN: tuple[tuple[str, type[WorkspaceUnavailable], str], ...] = (
    (r"no such image|image .*not found", ImageUnavailable, "pull it first, or correct its name"),
    (
        r"does not match the specified platform|exec format error|no matching manifest",
        ImageUnavailable,
        "it is for another platform: choose an image or a platform that fits this engine",
    ),
    (
        r"pull access denied|unauthorized|authentication required|no basic auth",
        ImageUnavailable,
        "correct its name, or give this user access to it: docker login",
    ),
    (
        r"manifest unknown|repository .*not found|name unknown|invalid reference format",
        ImageUnavailable,
        "correct its name",
    ),
    (
        r"no such host|i/o timeout|server misbehaving|network is unreachable|tls handshake|client\.timeout",
        ImageUnavailable,
        "the engine does not reach the registry: look at its network and proxy, or load the image: docker load",
    ),
    (r"no space left on device", EngineUnavailable, "make room on the engine's disk: docker system df"),
    (r"is already in use by container", WorkspaceUnavailable, "remove that one, or choose another name"),
    (
        r"port is already allocated|address already in use",
        WorkspaceUnavailable,
        "stop what uses the port, or let the engine choose one",
    ),
    (
        r"minimum memory limit|memory limit too (low|small)|invalid memory",
        WorkspaceUnavailable,
        "give it more memory",
    ),
    (
        r"unknown( or invalid)? runtime",
        IsolationUnavailable,
        "install the runtime and name it in the engine's daemon.json, or ask for runc",
    ),
    (
        r"could not select device driver",
        IsolationUnavailable,
        "install the container toolkit of the GPU's maker, or do without GPUs",
    ),
    (
        r"storage-opt is supported only|pquota",
        IsolationUnavailable,
        "leave out the size of its root: this engine's disk cannot limit it",
    ),
    (
        r"bind source path does not exist|error while creating mount source",
        WorkspaceUnavailable,
        "make the folder on the engine's machine, or correct its path",
    ),
    (
        r"invalid mode|invalid volume spec|invalid mount path",
        WorkspaceUnavailable,
        "write a mount as /host:/inside or /host:/inside:ro",
    ),
    (
        r"non-overlapping ipv4 address pool|all predefined address pools",
        EngineUnavailable,
        "remove networks that nobody uses: docker network prune",
    ),
    (r"network .*not found", WorkspaceUnavailable, "make the network, or correct its name"),
    (
        r"no such file or directory|executable file not found|permission denied: unknown",
        WorkspaceUnavailable,
        "correct the command, or choose an image that has it",
    ),
)


def is_lost(exc: BaseException) -> bool:
    """Whether the connection was not made or was lost: only then it helps to ask again at once."""
    if isinstance(exc, aiodocker.DockerError):
        return exc.status == NO_CONNECTION
    return isinstance(exc, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)


_REPEATED: Mapping[str, Any] = {
    "retry": tenacity.retry_if_exception(is_lost),
    "stop": tenacity.stop_after_delay(AGAIN_SECONDS),
    "wait": tenacity.wait_random_exponential(multiplier=0.1, max=1.0),
    "reraise": True,
}


def failure(exc: BaseException, *, phase: str, what: str, where: str, seconds: float) -> AgentServerError:
    """Tell in our words why a call failed.

    Args:
        exc: one of FAILURES.
        phase: of the start of a container, for whoever shows it.
        what: the call, as in "could not {what}".
        where: the engine's address.
        seconds: after which it counted as hanging.
    """
    if is_lost(exc):
        reason, mend = _unreachable(exc, where)
        return EngineUnavailable(f"{reason}: {mend}", phase="engine")
    if isinstance(exc, TimeoutError):
        sentence = f"the engine could not {what} within {seconds:g} s: look at its load and its log"
        return EngineUnavailable(sentence, phase=phase)
    if not isinstance(exc, aiodocker.DockerError):
        sentence = f"what answers at {where} is no container engine, or a broken one ({_told(exc)})"
        return EngineUnavailable(f"{sentence}: look at DOCKER_HOST", phase="engine")
    text = _plain(exc.message)
    details: dict[str, Any] = {"phase": phase, "status": exc.status}
    sentence = f"the engine could not {what}: {text}"
    if exc.status == 404 and phase == "engine":  # asked for itself, not needed for something else
        return NotFound(sentence, **details)
    for pattern, kind, mend in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return kind(f"{sentence}; {mend}", **details)
    if phase == "pull":
        return ImageUnavailable(sentence, **details)
    if exc.status == 404:
        return NotFound(sentence, **details)
    if exc.status >= 500:
        return EngineUnavailable(f"{sentence}; look at its log", **details)
    return WorkspaceUnavailable(sentence, **details)


def not_dialled(exc: BaseException) -> EngineUnavailable:
    """Tell why there is nothing to call: no address, a wrong one, or certificates that cannot be read."""
    if isinstance(exc, AssertionError):  # aiodocker's way to say that it has found no socket
        return EngineUnavailable(
            "there is no Docker socket on this machine: install and start Docker, or set DOCKER_HOST",
            phase="engine",
        )
    if isinstance(exc, ssl.SSLError | OSError):
        mend = "look at DOCKER_CERT_PATH: it needs ca.pem, cert.pem and key.pem"
        return EngineUnavailable(
            f"the certificates for the engine cannot be used ({_told(exc)}): {mend}", phase="engine"
        )
    mend = "use unix:///path/docker.sock or tcp://host:port"
    return EngineUnavailable(f"the engine's address makes no sense ({_told(exc)}): {mend}", phase="engine")


def _unreachable(exc: BaseException, where: str) -> tuple[str, str]:
    cause = exc.__context__ if isinstance(exc, aiodocker.DockerError) else exc
    if isinstance(cause, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return f"the engine at {where} and this client do not trust each other", "look at DOCKER_CERT_PATH"
    cause = getattr(cause, "os_error", cause)
    if isinstance(cause, PermissionError):
        mend = "add this user to the group of the socket (often: usermod -aG docker USER) and log in again"
        return f"this user may not use the engine at {where}", mend
    if isinstance(cause, FileNotFoundError):
        return f"there is no engine at {where}", "start Docker, or set DOCKER_HOST"
    if isinstance(cause, ConnectionRefusedError):
        return f"nothing listens at {where}", "start Docker, or set DOCKER_HOST"
    return (
        f"the Docker engine at {where} does not answer ({_told(cause)})",
        "see whether it runs: docker info",
    )


def _told(exc: BaseException | None) -> str:
    if isinstance(exc, tenacity.RetryError):
        exc = exc.last_attempt.exception()
    text = _plain(str(exc) if exc is not None else "")[:200]
    return text or type(exc).__name__


def _plain(text: object) -> str:
    """The engine's words as one short line."""
    words = str(text).strip()
    if words.startswith("{"):  # nobody has decoded it
        with suppress(ValueError, LookupError, RecursionError):
            words = str(json.loads(words)["message"])
    return " ".join(words.split()).rstrip(".")[:LONGEST_TEXT]
