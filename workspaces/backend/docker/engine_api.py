"""Calls to a container engine: each with its time, repeated where that is safe, and failing in our words."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import aiodocker
import aiohttp
import msgspec
import tenacity

from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable, NotFound
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


class EngineApi:
    """See the module's docstring. Entering finds the engine and sees that it is one that can be used."""

    def __init__(self, url: str | None = None, *, patience: float = 1.0) -> None:
        """Say which one.

        Args:
            url: e.g. unix:///run/docker.sock; None: DOCKER_HOST, the Docker context, the usual sockets.
            patience: all limits of time are multiplied by it.
        """
        self._url = url
        self.patience = patience
        self._docker: aiodocker.Docker

    async def __aenter__(self) -> Self:
        self._docker = dial(self._url)
        self.where: str = self._docker._connection_info
        """The engine's address, for people."""
        try:
            await self._negotiate()
        except BaseException:
            await self._docker.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._docker.close()

    async def _negotiate(self) -> None:
        version = await self.ask("GET", "version", what="tell its version", versioned=False)
        try:
            api = str(version["ApiVersion"])
            number = tuple(int(part) for part in api.split("."))
        except FAILURES as exc:
            raise self._failure(exc, "engine", "tell its version", ANSWER_SECONDS) from None
        if number < OLDEST_API:
            raise EngineUnavailable(
                f"the engine at {self.where} is too old (API {api}): use Docker 19.03 (API 1.40) or newer",
                phase="engine",
            )
        self.version: dict[str, Any] = version
        self._docker.api_version = f"v{api}"

    async def ask(
        self,
        method: str,
        path: str,
        *,
        what: str,
        phase: str = "engine",
        seconds: float = ANSWER_SECONDS,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        again: bool = False,
        versioned: bool = True,
    ) -> Any:
        """Send one call and return its decoded answer; None for an empty one.

        Args:
            method: of HTTP.
            path: without the version.
            what: the call, as in "the engine could not {what}".
            phase: goes into the error's details.
            seconds: after which the engine counts as hanging; a repetition counts, too.
            params: of the query.
            body: sent as JSON.
            again: whether it may be repeated when the connection is lost.
            versioned: whether the API's version goes into the path.

        Raises:
            NotFound, EngineUnavailable, WorkspaceUnavailable, ImageUnavailable, IsolationUnavailable.
        """

        async def once() -> Any:
            query = self._docker._query(
                path, method, params=params and dict(params), data=data, versioned_api=versioned
            )
            async with query as response, response:
                text = await response.read()
            return msgspec.json.decode(text) if text.strip() else None

        seconds *= self.patience
        data = None if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(seconds):
                return await (tenacity.AsyncRetrying(**_REPEATED)(once) if again else once())
        except FAILURES as exc:
            raise self._failure(exc, phase, what, seconds) from None

    @asynccontextmanager
    async def answer(
        self,
        method: str,
        path: str,
        *,
        what: str,
        phase: str = "engine",
        seconds: float = ANSWER_SECONDS,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str],
        data: bytes | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one call whose answer comes bit by bit, over a connection of its own; only its begin has a limit.

        Raises:
            As `ask`, also what the reader raises inside of the block.
        """
        docker = dial(self._url, self._docker.api_version)
        seconds *= self.patience
        try:
            async with docker:
                async with asyncio.timeout(seconds):
                    response = await docker._do_query(
                        path, method, params=dict(params), headers=headers, data=data
                    )
                async with response:
                    _keep_alive(response)
                    yield response
        except AgentServerError:
            raise
        except FAILURES as exc:
            raise self._failure(exc, phase, what, seconds) from None

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        what: str,
        phase: str = "engine",
        seconds: float = ANSWER_SECONDS,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str],
    ) -> AsyncIterator[aiohttp.StreamReader]:
        """Like `answer`, of which nothing but the content matters."""
        call = self.answer(
            method, path, what=what, phase=phase, seconds=seconds, headers=headers, params=params
        )
        async with call as response:
            yield response.content

    async def find(self, path: str, *, what: str) -> Any:
        """Ask for something that may not be there; None then."""
        try:
            return await self.ask("GET", path, what=what, again=True)
        except NotFound:
            return None

    def _failure(self, exc: BaseException, phase: str, what: str, seconds: float) -> AgentServerError:
        return failure(exc, phase=phase, what=what, where=self.where, seconds=seconds)


def dial(url: str | None, version: str = "auto") -> aiodocker.Docker:
    """Prepare connections to an engine; none is made yet.

    Raises:
        EngineUnavailable: there is no address, or a wrong one.
    """
    # aiodocker would take the user's current context before it, unlike every other client.
    url = url or from_caller(["DOCKER_HOST"]).get("DOCKER_HOST") or context_host()
    try:
        return aiodocker.Docker(url, api_version=version)
    except (AssertionError, ValueError, OSError, RuntimeError, ssl.SSLError, aiodocker.DockerError) as exc:
        raise not_dialled(exc) from None


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have the kernel end a connection over which nothing comes because the other machine is gone, in 30 s."""
    transport = response.connection.transport if response.connection is not None else None
    connected = transport.get_extra_info("socket") if transport is not None else None
    if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
