"""The connection to a container engine: each call with its time, repeated where that is safe, failing in our words.

Calls are made by aiodocker's objects. What they cannot do goes over aiodocker's session, by `request` and `stream`;
docs/dependencies.md says what that is.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import aiodocker
import aiohttp
import msgspec
import tenacity

from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable
from agent_sdk.workspace.environment import from_caller
from workspaces.backend.docker.docker_config import context_host
from workspaces.backend.docker.engine_failure import FAILURES, failure, is_lost, not_dialled

OLDEST_API = (1, 40)
"""Of Docker 19.03."""
ANSWER_SECONDS = 10.0
AGAIN_SECONDS = 5.0
"""For so long a call that changes nothing is repeated when the connection is lost: longer than most engines restart."""

_REPEATED: Mapping[str, Any] = {
    "retry": tenacity.retry_if_exception(is_lost),
    "stop": tenacity.stop_after_delay(AGAIN_SECONDS),
    "wait": tenacity.wait_random_exponential(multiplier=0.1, max=1.0),
    "reraise": True,
}

Call = Callable[[], Awaitable[Any]]


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


def _named(url: str | None) -> str | None:
    """The address that was given, or is in the environment; None: aiodocker finds one.

    aiodocker would take the user's current context before DOCKER_HOST, unlike every other client.
    """
    return url or from_caller(["DOCKER_HOST"]).get("DOCKER_HOST") or context_host()


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
