"""A box: one LocalWorkspace behind a Unix socket. `python -m agent_sdk.box --folder PATH --root DIR`.

It owns the processes, terminals, output and files of its workspace and outlives every connection and
the server that started it. It listens at `box.sock` in a folder of its own, or on a socket it was given,
prints `ready` when it does, ends on SIGTERM, and by itself when nobody has been connected for `--linger`
seconds: then it ends its commands and removes their output and its folder. It needs no network and no aiohttp.

One that is alone in a container is started `--unclaimed`: until somebody has claimed it nothing runs in it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from _operator import _compare_digest as compare_digest  # hmac would load OpenSSL, 3.6 MB
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

from msgspec.structs import replace

from agent_sdk.box.seccomp import hide_memory, install_filter
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import AgentServerError, StateConflict, StorageFull, Unauthorized
from agent_sdk.protocol.methods.connection import ClientInfo, Initialize, Initialized, Ping, Pong
from agent_sdk.protocol.methods.method import Done, Notice
from agent_sdk.protocol.methods.workspace import Claim, Describe
from agent_sdk.protocol.results import WorkspaceInfo
from agent_sdk.protocol.specs import PROTOCOL_VERSION, Limits
from agent_sdk.rpc.peer import Handler, Inbound, Peer
from agent_sdk.rpc.pipe import Pipe
from agent_sdk.rpc.unix import serve_socket, serve_unix
from agent_sdk.version import __version__
from agent_sdk.workspace.environment import unpacked
from agent_sdk.workspace.limits import Cgroup, LimitWatch, present_profile
from agent_sdk.workspace.local import LocalWorkspace
from agent_sdk.workspace.service import workspace_handlers
from agent_sdk.workspace.users import find_user, give_name

SOCKET, RECORD = "box.sock", "box.json"
LOG_BYTES = 1 << 20
THREADS = 2
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


class BoundedLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error. Where that is a file it begins anew after 1 MiB: nobody else looks after it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Part of logging.Handler."""
        with suppress(OSError):
            if os.fstat(2).st_size > LOG_BYTES:
                os.ftruncate(2, 0)
        super().emit(record)


async def serve(given: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT comes or nobody is connected for `linger` seconds."""
    loop = asyncio.get_running_loop()
    limits = None
    if given.unclaimed or Cgroup().memory_max is not None:
        limits = LimitWatch(given.working_dir or given.root)
    if given.unclaimed:
        loop.set_default_executor(_threads())
    isolated = given.seccomp or given.unclaimed
    async with LocalWorkspace(
        given.root,
        working_dir=given.working_dir,
        confined=not given.unconfined,
        env={**(find_user(given.user).environment if given.user else {}), **unpacked()},
        spool_dir=given.spool,
        spare_bash=shlex.split(given.spare_bash),
        limits=limits,
        isolated=isolated,
    ) as workspace:
        box = BoxService(
            workspace,
            linger=given.linger,
            instance=given.instance or new_id(),
            limits=limits,
            isolated=isolated,
            unclaimed=given.unclaimed,
            token=_token(given.token_fd),
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, box.over.set)
        async with _listening(given, box):
            if given.unclaimed:  # the server may be another user; the folder around it is private
                os.chmod(os.path.join(given.folder, SOCKET), 0o666)
            _say_ready(given.ready)
            await box.over.wait()


def _token(descriptor: int | None) -> str:
    if descriptor is None:
        return ""
    with os.fdopen(descriptor) as file:
        return file.read()


def _threads() -> ThreadPoolExecutor:
    """Threads that are there when they are needed: commands may leave no room for another one."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="box")
    all_there = threading.Barrier(THREADS)
    for _ in range(THREADS):
        threads.submit(all_there.wait)
    return threads


def _listening(given: argparse.Namespace, box: BoxService) -> AbstractAsyncContextManager[None]:
    if given.listen is None:
        return serve_unix(os.path.join(given.folder, SOCKET), box.serve)
    listening = socket.socket(fileno=given.listen)
    listening.setblocking(False)
    listening.set_inheritable(False)
    return serve_socket(listening, box.serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a box; returns the exit code."""
    given = _options().parse_args(arguments)
    logging.basicConfig(handlers=[BoundedLog()], level=logging.WARNING)
    try:
        if given.user is not None:
            from agent_sdk.box.seccomp import become  # noqa: PLC0415  only some boxes in containers need it

            become(give_name(find_user(given.user)))
        if given.seccomp:
            install_filter()
        if given.init:
            _begin_below()
        asyncio.run(serve(given))
    except (AgentServerError, OSError) as exc:
        sys.stderr.write(f"box: {exc}\n")
        return 1
    _remove(given.folder, given.spool)
    return 0


def _begin_below() -> None:
    """Go on in a child. This process passes signals on to it and reaps what commands leave, as the first one has to."""
    box = os.fork()
    if box == 0:
        return
    hide_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(box, number))
    while True:
        ended, status = os.wait()
        if ended == box:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent_sdk.box", description="Serve a workspace on a Unix socket.")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--folder", help=f"its own folder, for {SOCKET}; removed at its end")
    place.add_argument("--listen", type=int, metavar="FD", help="a socket that listens already, instead")
    parser.add_argument("--root", required=True, help="folder of the workspace")
    parser.add_argument("--working-dir", help="where commands start; default: the root")
    parser.add_argument("--spool", help="its own folder for output of commands; default: a temporary one")
    parser.add_argument("--unconfined", action="store_true", help="file calls may leave the root")
    parser.add_argument("--linger", type=float, default=3600.0, help="seconds to live without a connection")
    parser.add_argument("--instance", help="what it calls itself; default: a random name")
    parser.add_argument(
        "--token-fd", type=int, metavar="FD", help="holds what connections have to show; default: nothing"
    )
    parser.add_argument(
        "--unclaimed",
        action="store_true",
        help="it is alone in a container, and gets its name and environment by a claim",
    )
    parser.add_argument(
        "--seccomp", action="store_true", help="filter the system calls of all that runs in it"
    )
    parser.add_argument("--user", help="become this user, and let commands be run as others")
    parser.add_argument("--init", action="store_true", help="be the first process of a container, too")
    parser.add_argument("--ready", help="a FIFO somebody reads, to write `ready` to")
    parser.add_argument("--spare-bash", default="", help="how bash is started where there is none")
    return parser


def _say_ready(fifo: str | None) -> None:
    """Tell whoever started it, who may be gone by now; nothing it says later may depend on them."""
    if fifo is not None:
        with suppress(OSError):
            descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            os.write(descriptor, b"ready\n")
            os.close(descriptor)
    with suppress(BrokenPipeError):
        os.write(1, b"ready\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _remove(folder: str | None, spool: str | None) -> None:
    """Remove our folders; whoever finds the record knows that we are not done yet, so it goes last."""
    with suppress(OSError):
        if spool is not None:
            os.rmdir(spool)
        if folder is None:
            return
        for name in sorted(os.listdir(folder), key=RECORD.__eq__):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
