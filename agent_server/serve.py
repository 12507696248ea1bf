"""A server from its start to its end, in that order: log lines, data folder, key, event log, conversations, port."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from agent_sdk.cancellation import cancel_and_wait
from agent_sdk.conversation.store import AgentStore
from agent_sdk.log.event_log import EventLog
from agent_sdk.protocol.errors import AgentServerError
from agent_server import data_folder, logs
from agent_server.app import Routes, listening
from agent_server.config.options import ServerConfig
from agent_server.config.sources import CANNOT_CREATE, DISK_FAILED, StartRefused, is_loopback
from agent_server.conversations.registry import Conversations
from agent_server.http.connection import ConnectionLimiter
from agent_server.http.security import Authority, WrongKeys
from agent_server.keys import ApiKey, obtain_keys, obtain_sealer, read_keys
from agent_server.logs import Log, Logs
from agent_server.metrics import Metrics
from agent_server.runtime_api.service import runtime_api
from agent_server.session.session import BACK_AFTER_MS, CLOSE_DRAINING, Sessions
from agent_server.work import Work
from workspaces.backend.contract import Ready

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FOR_WORK = 0.95
"""The part of `drain_seconds` that running calls get; the rest is for ending what they left."""
FAREWELL_SECONDS = 1.0
ENDING_SECONDS = 5.0
"""After `drain_seconds`: what is not ended by then is left as `kill -9` would leave it."""
AT_ONCE_SECONDS = 1.5
"""The same after the second signal."""
KEPT_DESCRIPTORS = 64
KEPT_TO_ITSELF = 0o077
"""The umask of a server: others see nothing of what it makes."""
OPEN_FILES = 65_536
"""Commands inherit the limit, and some programs walk through all of it: not more than needed."""


OnReady = Callable[[Ready], None]
OnFailure = Callable[[BaseException], object]


async def serve(config: ServerConfig, *, on_ready: OnReady, log_to: TextIO | None = None) -> None:
    """Run a server until SIGTERM or SIGINT. It prints nothing; its log goes to standard error.

    The first signal drains: new work is refused, running calls get `drain_seconds`, then connections are
    closed with 4503 and boxes kept or ended. The second signal ends it at once. Whatever holds up the end, the
    process exits with 0 a few seconds after its time. When the disk below the log fails it exits with 74 in the
    same moment: nothing more is acknowledged, boxes are left alone.

    Args:
        on_ready: called once when connections are accepted.
        log_to: instead of standard error.

    Raises:
        StartRefused: it cannot start; the text is one sentence for a person.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def ask() -> None:
        stop.ask()
        seconds = AT_ONCE_SECONDS if stop.now.is_set() else config.drain_seconds + ENDING_SECONDS
        loop.call_later(seconds, os._exit, 0)
        if not started:
            task.cancel()

    stop, started = Stop(), False
    with _signals(ask):
        try:
            async with serving(config, on_ready=on_ready, stop=stop, log_to=log_to, on_failure=_exit):
                started = True
                await stop.asked.wait()
        except asyncio.CancelledError:
            if started or not stop.asked.is_set():
                raise
            task.uncancel()


class Stop:
    """The wish that the server ends: `asked` to finish what runs, `now` to let it be."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.now = asyncio.Event()

    def ask(self) -> None:
        """Ask to end; asking again means now."""
        (self.now if self.asked.is_set() else self.asked).set()


@asynccontextmanager
async def serving(
    config: ServerConfig,
    *,
    on_ready: OnReady,
    stop: Stop | None = None,
    log_to: TextIO | None = None,
    on_failure: OnFailure | None = None,
) -> AsyncIterator[None]:
    """Run a server for the length of the block; leaving drains it.

    Args:
        on_failure: called when the disk below the log has failed, and no write can be trusted any more.
    """
    stop = stop or Stop()
    with (
        logs.opened(style=config.log_format, level=config.log_level, stream=log_to) as opened,
        _kept_to_itself() as before,
        data_folder.locked(config.folder) as folder,
    ):
        await folder.confine(config.isolation, config.box_user, umask=before)
        if folder.copied:
            opened.log.warning(
                "data_folder_copied", advice="boxes and runtimes of the original are left alone"
            )
        key, texts = obtain_keys(config)
        sealer, secrets_keys = obtain_sealer(config)
        opened.redactor.add([*texts, config.metrics_key, *secrets_keys])
        descriptors = _set_limits()
        metrics, wrong_keys = Metrics(), WrongKeys()
        store = AgentStore(sealer, restarts=config.max_turn_restarts)
        work = Work(max_turns=config.max_turns, max_pending_writes=config.max_pending_writes)
        async with (
            _event_log(folder.log) as log,
            Conversations(config, folder, log, opened, metrics, work, store) as conversations,
            runtime_api(config, folder.runtimes, opened, work, key, wrong_keys) as runtime_routes,
        ):
            for sentence in log.recovered:
                opened.log.warning("log_recovered", problem=sentence)
            work.pending_writes, work.disk_full = log.pending_writes, lambda: log.full
            if on_failure is not None:
                log.failed.add_done_callback(partial(_failed, opened, on_failure))
            for_metrics = ApiKey(config.metrics_key) if config.metrics_key else None
            authority = Authority(key, wrong_keys, for_metrics=for_metrics)
            sessions = Sessions(config, conversations, authority, opened, metrics, work)
            routes = Routes(sessions)
            limiter = ConnectionLimiter(_room(config, descriptors), config.max_strangers, metrics)
            async with listening(config, sessions, routes, limiter, *runtime_routes) as port:
                _read_again_at_hangup(config, key, limiter, opened)
                ready = Ready(
                    url=_url(config.host, port),
                    api_key_file=str(key.file) if key.file else None,
                    pid=os.getpid(),
                )
                _warn(config, opened.log)
                opened.log.info("server_started", url=ready.url, data=config.data)
                with folder.announced(ready.url):
                    on_ready(ready)
                    try:
                        yield
                    finally:
                        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
                    await _drain(config, sessions, conversations, routes, stop, opened)


def _read_again_at_hangup(
    config: ServerConfig, key: ApiKey, limiter: ConnectionLimiter, opened: Logs
) -> None:
    """Have SIGHUP read the file of keys again. Where there is no such file the signal means what it always does."""
    if not config.api_keys_file:
        return
    file = Path(config.api_keys_file)

    def read() -> None:
        try:
            texts = read_keys(file)
        except StartRefused as exc:
            opened.log.error("keys_not_read", problem=str(exc), advice="those from before go on counting")
            return
        opened.redactor.add(texts)
        key.replace(texts)
        limiter.look_again(key.has)
        opened.log.info("keys_read", count=len(texts))

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read)


async def _drain(
    config: ServerConfig,
    sessions: Sessions,
    conversations: Conversations,
    routes: Routes,
    stop: Stop,
    opened: Logs,
) -> None:
    work = sessions.work
    work.draining = True
    opened.log.info("server_draining", calls=work.running)
    sessions.announce_end()
    routes.end()
    conversations.wind_down()
    waiting = asyncio.ensure_future(work.finished(config.drain_seconds * FOR_WORK))
    await _either(waiting, asyncio.ensure_future(stop.now.wait()))
    finished = not waiting.cancelled() and waiting.result()
    if stop.now.is_set():
        opened.log.warning("server_stops_at_once", calls=work.running)
    await conversations.note_clients()
    dismissing = asyncio.ensure_future(
        sessions.dismiss(CLOSE_DRAINING, f"the server is stopping; retry_after_ms={BACK_AFTER_MS}")
    )
    # Clients that listen hear why they are cut off before their commands are ended; frozen ones hold nothing up.
    await asyncio.wait([dismissing], timeout=FAREWELL_SECONDS)
    await conversations.close()
    await dismissing
    opened.log.info("server_stopped", finished=finished)


async def _either(*tasks: asyncio.Future[bool]) -> None:
    """Wait for the first of them, cancel the others."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_and_wait(*tasks)


def _failed(logs: Logs, on_failure: OnFailure, failed: asyncio.Future[BaseException]) -> None:
    if not failed.cancelled():
        error = failed.result()
        logs.log.critical(
            "disk_failed", problem=str(error), advice="the server ends; boxes and commands go on"
        )
        logs.end()
        on_failure(error)


def _exit(error: BaseException) -> None:
    """End without leaving anything: every clean-up would write, or acknowledge, or end what goes on."""
    os._exit(DISK_FAILED)


@asynccontextmanager
async def _event_log(path: Path) -> AsyncIterator[EventLog]:
    async with AsyncExitStack() as stack:
        try:
            log = await stack.enter_async_context(EventLog.open(path, sole=True))
        except AgentServerError as exc:
            raise StartRefused(
                f"the event log {path} cannot be opened: {exc}", exit_code=CANNOT_CREATE
            ) from None
        yield log


@contextmanager
def _kept_to_itself() -> Iterator[int]:
    """Have the umask of a server; yields the one of before, which its commands go on with."""
    before = os.umask(KEPT_TO_ITSELF)
    try:
        yield before
    finally:
        os.umask(before)


@contextmanager
def _signals(ask: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, ask)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def _warn(config: ServerConfig, log: Log) -> None:
    for sentence in config.unknown:
        log.warning("unknown_variable", problem=sentence)
    if is_loopback(config.host):
        return
    log.warning("network_reachable", host=config.host, advice="put TLS in front: the key crosses the network")
    if not config.allow_hosts:
        log.warning("host_names_refused", advice="allow_hosts lists names that clients may use")


def _url(host: str, port: int) -> str:
    """Where a client of this machine reaches it."""
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return f"http://{anywhere.get(host) or (f'[{host}]' if ':' in host else host)}:{port}"


def _room(config: ServerConfig, descriptors: int) -> int:
    """How many connections there may be: some descriptors are kept for boxes and files, so that none is missing."""
    return min(config.max_connections, max(descriptors - max(descriptors // 8, KEPT_DESCRIPTORS), 1))


def _set_limits() -> int:
    """Allow many open files, for connections and boxes; leave no core dumps, because keys are in them.

    Returns how many files may be open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
