"""The HTTP server: routes behind its security, its own listening socket, its own start and stop."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler

from agent_server.config.options import ServerConfig
from agent_server.config.sources import TRY_LATER, StartRefused
from agent_server.http.connection import Connection, ConnectionLimiter, ProxyRules
from agent_server.http.security import HostRules, OriginRules, Security
from agent_server.routes import Routes
from agent_server.session.session import Sessions

BACKLOG = 512
SEND_BUFFER = 128 << 10
"""Bytes that the kernel keeps for a reader that does not read (Linux doubles it); without this some 4 MiB."""
LAST_ANSWERS_SECONDS = 1.0
LINGER_SECONDS = 1.0
"""How long the rest of a refused body is read, so that the client finds the answer and not a reset connection."""
UNACKNOWLEDGED_MS = 30_000
"""How long sent bytes may stay unacknowledged until the kernel gives the connection up."""
CANNOT_LISTEN = {
    errno.EADDRINUSE: "the port is in use; choose another with --port, 0 takes a free one",
    errno.EACCES: "this user may not use the port; choose one above 1023 with --port",
    errno.EADDRNOTAVAIL: "no network interface of this machine has the address; choose another with --host",
}


@asynccontextmanager
async def listening(
    config: ServerConfig,
    sessions: Sessions,
    routes: Routes,
    limiter: ConnectionLimiter,
    own_keys: Sequence[web.RouteDef] = (),
    at: Callable[[str], Handler | None] = lambda host: None,
) -> AsyncIterator[int]:
    """Serve HTTP for the length of the block; yields the port.

    Leaving closes the listening socket and the connections at once: whoever leaves has let the work
    finish and told the sessions.

    Args:
        config, sessions, routes, limiter: what is served, and to whom.
        own_keys: further routes, which check keys of their own.
        at: what serves all that is asked of another host name; None: this server does.

    Raises:
        StartRefused: the address or the port cannot be had.
    """
    security = Security(
        HostRules(config.host, config.allow_hosts),
        OriginRules(config.allow_origins),
        sessions.authority,
        sessions.logs,
        sessions.metrics,
        [route.handler for route in own_keys],
        at,
    )
    proxies = ProxyRules(config.proxies)
    app = web.Application(middlewares=security.middlewares(), client_max_size=config.limits.message_bytes)
    app.on_response_prepare.append(security.label)
    app.add_routes([*routes.table(), *own_keys])
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=LAST_ANSWERS_SECONDS)
    await runner.setup()
    left: list[Connection] = []
    try:
        server = runner.server
        assert server is not None

        def connect() -> Connection:
            return Connection(
                server,
                limiter,
                longest_message=config.limits.frame_bytes,
                proxies=proxies,
                access_log=None,
                auto_decompress=False,  # what is passed on goes as it came
                keepalive_timeout=config.handshake_seconds,
                lingering_time=LINGER_SECONDS,
            )

        listener = await asyncio.get_running_loop().create_server(
            connect, sock=bound_to(config.host, config.port), backlog=BACKLOG
        )
        try:
            yield int(listener.sockets[0].getsockname()[1])
        finally:
            listener.close()
            left = cast(list[Connection], server.connections)
            for connection in left:
                connection.force_close()
    finally:
        await runner.cleanup()
        for connection in left:
            connection.abort()  # of those who read nothing something is left to be sent


def bound_to(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        StartRefused: the address or the port cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as exc:
        raise StartRefused(f"cannot listen on {host}: {exc.strerror}; choose another with --host") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these from the socket that accepts them.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        with suppress(OSError):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
        bound.bind(address)
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as exc:
        bound.close()
        reason = CANNOT_LISTEN.get(exc.errno or 0, exc.strerror)
        raise StartRefused(f"cannot listen on {host}:{port}: {reason}", exit_code=TRY_LATER) from None
    return bound
