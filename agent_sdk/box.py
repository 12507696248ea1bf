"""A box: one LocalWorkspace behind a Unix socket. `python -m agent_sdk.box --socket PATH --root DIR`.

It owns the processes, terminals, output and files of its workspace and outlives every connection.
It prints `ready` when it listens, ends on SIGTERM, and by itself when nobody has been connected for
`--linger` seconds, so that a killed server leaves nothing behind. It needs no network and no aiohttp.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # asyncio does without ssl; a box speaks to one Unix socket, and OpenSSL would cost it 1.3 MB.
    sys.modules["ssl"] = None  # type: ignore[assignment]

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from agent_sdk.local.workspace import LocalWorkspace
from agent_sdk.protocol.errors import AgentServerError
from agent_sdk.protocol.methods import ClientInfo, Initialize, Initialized, Ping, Pong
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.rpc.ledger import Ledger
from agent_sdk.rpc.peer import Handler, Inbound, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.rpc.unix import serve_unix
from agent_sdk.serve import weight, workspace_handlers
from agent_sdk.version import __version__

logger = logging.getLogger("agent_sdk.box")


class Box:
    """What serves the connections of one workspace; see the module's docstring."""

    def __init__(self, workspace: LocalWorkspace, *, linger: float) -> None:
        self._handlers: dict[type, Handler] = {
            **workspace_handlers(workspace, Ledger(weigh=weight)),
            Initialize: self._initialize,
            Ping: self._ping,
        }
        self._linger = linger
        self._connected = 0
        self._alone: asyncio.TimerHandle | None = None
        self.over = asyncio.Event()
        self._wait_for_company()

    async def serve(self, pipe: Pipe) -> None:
        """Serve one connection until it ends."""
        self._connected += 1
        if self._alone is not None:
            self._alone.cancel()
        try:
            async with Peer(pipe, self._handlers, opener=False, strict=True, on_bug=_log_bug) as peer:
                await peer.wait_closed()
        finally:
            self._connected -= 1
            self._wait_for_company()

    def _wait_for_company(self) -> None:
        if self._connected == 0:
            self._alone = asyncio.get_running_loop().call_later(self._linger, self.over.set)

    async def _initialize(self, params: Initialize, call: Inbound) -> Initialized:
        call.peer.other_limits = params.limits
        return Initialized(
            protocol_version=PROTOCOL_VERSION,
            server=ClientInfo(name="agent-box", version=__version__),
            limits=Limits(),
            connection_id="box",
            heartbeat_s=20.0,
        )

    async def _ping(self, params: Ping, call: Inbound) -> Pong:
        return Pong()


async def serve(
    socket: str, root: str, *, working_dir: str | None, confined: bool, linger: float, spool: str | None
) -> None:
    """Serve until SIGTERM or SIGINT comes or nobody is connected for `linger` seconds."""
    loop = asyncio.get_running_loop()
    async with LocalWorkspace(root, working_dir=working_dir, confined=confined, spool_dir=spool) as workspace:
        box = Box(workspace, linger=linger)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, box.over.set)
        async with serve_unix(socket, box.serve):
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            await box.over.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a box; returns the exit code."""
    parser = argparse.ArgumentParser(prog="agent_sdk.box", description="Serve a workspace on a Unix socket.")
    parser.add_argument("--socket", required=True, help="path of the socket, at most 107 bytes")
    parser.add_argument("--root", required=True, help="folder of the workspace")
    parser.add_argument("--working-dir", help="where commands start; default: the root")
    parser.add_argument("--spool", help="folder for output of commands; default: a temporary one")
    parser.add_argument("--unconfined", action="store_true", help="file calls may leave the root")
    parser.add_argument("--linger", type=float, default=30.0, help="seconds to live without a connection")
    given = parser.parse_args(arguments)
    try:
        asyncio.run(
            serve(
                given.socket,
                given.root,
                working_dir=given.working_dir,
                confined=not given.unconfined,
                linger=given.linger,
                spool=given.spool,
            )
        )
    except (AgentServerError, OSError) as exc:
        sys.stderr.write(f"box: {exc}\n")
        return 1
    finally:
        with suppress(FileNotFoundError):
            os.unlink(given.socket)
    return 0


def _log_bug(bug: BaseException, incident: str) -> None:
    logger.error("incident %s", incident, exc_info=bug)


if __name__ == "__main__":
    sys.exit(main())
