"""What serves the connections of a box: its workspace, its name, and what it tells of itself."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from msgspec.structs import replace

from agent_sdk.limits import LimitWatch
from agent_sdk.local.workspace import LocalWorkspace
from agent_sdk.profile import present_profile
from agent_sdk.protocol.errors import StateConflict, StorageFull
from agent_sdk.protocol.methods import (
    Claim,
    ClientInfo,
    Describe,
    Done,
    Initialize,
    Initialized,
    Notice,
    Ping,
    Pong,
)
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.rpc.ledger import Ledger
from agent_sdk.rpc.peer import Handler, Inbound, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.serve import weight, without_output, workspace_handlers
from agent_sdk.version import __version__

FIRST_SECONDS = 30.0
"""How long it waits for its first company at least, however short it lingers later."""

logger = logging.getLogger("agent_sdk.box")


class BoxService:
    """Serves one workspace to any number of connections, for as long as there are some or may be again."""

    def __init__(
        self,
        workspace: LocalWorkspace,
        *,
        linger: float,
        instance: str,
        limits: LimitWatch | None = None,
        isolated: bool = False,
    ) -> None:
        """Begin to wait for company.

        Args:
            workspace: what it serves.
            linger: seconds it stays without a connection.
            instance: its name; of one that is claimed until then.
            limits: of the container it is alone in; it has to be claimed then.
            isolated: whether it tells what is in force.
        """
        self._isolated = isolated
        self._limits = limits
        self._peers: set[Peer] = set()
        self._workspace = workspace
        self._ledger = Ledger(weigh=weight, strip=without_output)
        self._claimed: Claim | None = None
        served = workspace_handlers(workspace, self._ledger)
        self._described = served[Describe]
        if limits is not None:
            limits.on_reached = self._tell
            served = {method: self._in_container(handler, limits) for method, handler in served.items()}
            served[Claim] = self._claim
        self._handlers: dict[type, Handler] = {
            **served,
            Describe: self._describe,
            Initialize: self._initialize,
            Ping: self._ping,
        }
        self._linger = linger
        self._instance = instance
        self._alone: asyncio.TimerHandle | None = None
        self.over = asyncio.Event()
        self._wait_for_company(max(linger, FIRST_SECONDS))

    async def serve(self, pipe: Pipe) -> None:
        """Serve one connection until it ends."""
        if self._alone is not None:
            self._alone.cancel()
        peer = Peer(pipe, self._handlers, opener=False, strict=True, on_bug=_log_bug)
        self._peers.add(peer)
        try:
            async with peer:
                await peer.wait_closed()
        finally:
            self._peers.discard(peer)
            if not self._peers:
                self._wait_for_company(self._linger)

    def _wait_for_company(self, seconds: float) -> None:
        self._alone = asyncio.get_running_loop().call_later(seconds, self.over.set)

    async def _initialize(self, params: Initialize, call: Inbound) -> Initialized:
        call.peer.other_limits = params.limits
        return Initialized(
            protocol_version=PROTOCOL_VERSION,
            server=ClientInfo(name="agent-box", version=__version__),
            limits=Limits(),
            connection_id=self._instance,
            heartbeat_s=20.0,
        )

    async def _describe(self, params: Describe, call: Inbound) -> WorkspaceInfo:
        info: WorkspaceInfo = await self._described(params, call)
        return replace(info, profile=present_profile()) if self._isolated else info

    def _in_container(self, handler: Handler, limits: LimitWatch) -> Handler:
        async def handle(params: Any, call: Inbound) -> Any:
            if self._claimed is None:
                raise StateConflict("the box is not claimed yet: nothing runs in it before box.claim")
            try:
                return await handler(params, call)
            except StorageFull:
                limits.found_full()
                raise
            finally:
                limits.look()

        return handle

    def _tell(self, notice: Notice) -> None:
        for peer in self._peers:
            peer.notify(notice)

    async def _claim(self, params: Claim, call: Inbound) -> WorkspaceInfo:
        async def claim() -> Done:
            if self._claimed is None:
                self._workspace.add_environment(params.env)
                self._claimed, self._instance = params, params.instance
            elif (self._claimed.instance, self._claimed.env) != (params.instance, params.env):
                raise StateConflict(f"the box is claimed already, by {self._instance}; start another one")
            return Done()

        await self._ledger.run(params, claim)
        info: WorkspaceInfo = await self._describe(Describe(), call)
        return info

    async def _ping(self, params: Ping, call: Inbound) -> Pong:
        return Pong()


def _log_bug(bug: BaseException, incident: str) -> None:
    logger.error("incident %s", incident, exc_info=bug)
