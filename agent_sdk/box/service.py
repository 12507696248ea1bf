"""What serves the connections of a box: its workspace, its name, and what it tells of itself."""

from __future__ import annotations

import asyncio
import logging
from _operator import _compare_digest as compare_digest  # hmac would load OpenSSL, 3.6 MB
from typing import Any

from msgspec.structs import replace

from agent_sdk.box.seccomp import hide_memory
from agent_sdk.protocol.errors import StateConflict, StorageFull, Unauthorized
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize, Initialized, Ping, Pong
from agent_sdk.protocol.methods.method import Done, Notice
from agent_sdk.protocol.methods.workspace import Claim, Describe
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.rpc.peer import Handler, Inbound, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.version import __version__
from agent_sdk.workspace.limits import LimitWatch, present_profile
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.service import workspace_handlers

FIRST_SECONDS = 30.0
"""How long it waits for its first company at least, however short it lingers later."""

STRANGERS = 32
"""Connections that have not shown the token, at a time. The oldest gives way: who has it shows it at once."""

_STRANGER = "this box serves whoever has started it, and nobody else: show its token in initialize"

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
        unclaimed: bool = False,
        token: str = "",
    ) -> None:
        """Begin to wait for company.

        Args:
            workspace: what it serves.
            linger: seconds it stays without a connection.
            instance: its name; of one that is claimed until then.
            limits: those of its control group, where there are some.
            isolated: whether it tells what is in force, and hides from what it runs.
            unclaimed: whether it has to be claimed before anything runs in it.
            token: what connections have to show; empty: nothing, or what it is claimed with.
        """
        self._isolated = isolated
        self._limits = limits
        self._peers: set[Peer] = set()
        """Those that may use it. The others are no company: a command of its own may be at the other end."""
        self._strangers: dict[Peer, asyncio.Task[None]] = {}
        """Those others, the oldest first, and what serves them."""
        self._token = token
        self._workspace = workspace
        self._operations = workspace.operations
        self._claimed: Claim | None = None
        served = workspace_handlers(workspace)
        self._described = served[Describe]
        if limits is not None:
            limits.on_reached = self._tell
            served = {method: _watched(handler, limits) for method, handler in served.items()}
        if unclaimed:
            served = {method: self._once_claimed(handler) for method, handler in served.items()}
            served[Claim] = self._claim
        served |= {Describe: self._describe, Ping: self._ping}
        self._handlers: dict[type, Handler] = {
            **{method: self._for_company(handler) for method, handler in served.items()},
            Initialize: self._initialize,
        }
        self._linger = linger
        self._instance = instance
        self._alone: asyncio.TimerHandle | None = None
        self.over = asyncio.Event()
        self._wait_for_company(max(linger, FIRST_SECONDS))

    async def serve(self, pipe: Pipe) -> None:
        """Serve one connection until it ends."""
        peer = Peer(pipe, self._handlers, opener=False, strict=True, on_bug=_log_bug)
        task = asyncio.current_task()
        if not self._token:
            self._welcome(peer)
        elif task is not None:
            self._strangers[peer] = task
            if len(self._strangers) > STRANGERS:
                self._strangers.pop(next(iter(self._strangers))).cancel()
        try:
            async with peer:
                await peer.wait_closed()
        finally:
            self._strangers.pop(peer, None)
            if peer in self._peers:
                self._peers.discard(peer)
                if not self._peers:
                    self._wait_for_company(self._linger)

    def _welcome(self, peer: Peer) -> None:
        if self._alone is not None:
            self._alone.cancel()
        self._strangers.pop(peer, None)
        self._peers.add(peer)

    def _hide(self) -> None:
        """From now on commands may run. Until then whoever has started it finds it by its environment."""
        if self._isolated:
            hide_memory()

    def _wait_for_company(self, seconds: float) -> None:
        self._alone = asyncio.get_running_loop().call_later(seconds, self.over.set)

    async def _initialize(self, params: Initialize, call: Inbound) -> Initialized:
        if self._token and call.peer not in self._peers:
            if not compare_digest((params.auth or "").encode(), self._token.encode()):
                raise Unauthorized(_STRANGER)
            self._welcome(call.peer)
            self._hide()
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

    def _for_company(self, handler: Handler) -> Handler:
        async def handle(params: Any, call: Inbound) -> Any:
            if call.peer not in self._peers:
                raise Unauthorized(_STRANGER)
            return await handler(params, call)

        return handle

    def _once_claimed(self, handler: Handler) -> Handler:
        async def handle(params: Any, call: Inbound) -> Any:
            if self._claimed is None:
                raise StateConflict("the box is not claimed yet: nothing runs in it before box.claim")
            return await handler(params, call)

        return handle

    def _tell(self, notice: Notice) -> None:
        for peer in self._peers:
            peer.notify(notice)

    async def _claim(self, params: Claim, call: Inbound) -> WorkspaceInfo:
        async def claim() -> Done:
            if self._claimed is None:
                self._workspace.add_environment(params.env)
                self._claimed, self._instance = params, params.instance
                if params.token:
                    self._token, self._peers = params.token, {call.peer}
                self._hide()
            elif replace(self._claimed, op_id="") != replace(params, op_id=""):
                raise StateConflict(f"the box is claimed already, by {self._instance}; start another one")
            return Done()

        await self._operations.run(params, claim, call)
        info: WorkspaceInfo = await self._describe(Describe(), call)
        return info

    async def _ping(self, params: Ping, call: Inbound) -> Pong:
        return Pong()


def _watched(handler: Handler, limits: LimitWatch) -> Handler:
    async def handle(params: Any, call: Inbound) -> Any:
        try:
            return await handler(params, call)
        except StorageFull:
            limits.found_full()
            raise
        finally:
            limits.look()

    return handle


def _log_bug(bug: BaseException, incident: str) -> None:
    logger.error("incident %s", incident, exc_info=bug)
