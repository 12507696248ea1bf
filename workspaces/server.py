"""An agent server on a machine of a backend: started until it accepts connections, found again, ended."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import msgspec

from agent_sdk.cancellation import cancel_and_wait, to_its_end
from agent_sdk.protocol.errors import AgentServerError, WorkspaceUnavailable
from workspaces.backend.contract import KEY_NAME, Backend, Ending, Machine, OnProgress, Ready, one_line, said

logger = logging.getLogger("workspaces")

OnLog = Callable[[str], Awaitable[None] | None]
"""Called with each line that the server writes."""
Follow = Callable[[str, bool], AsyncIterator[str]]
"""Yields the lines of the machine with this id until it ends; where the second is true, without those from before."""
ANSWER_SECONDS = 2.0


class Server:
    """One server. It goes on when it is let go of, and whoever describes it again finds it by its machine's name."""

    def __init__(
        self,
        backend: Backend,
        machine: Machine,
        *,
        follow: Follow | None = None,
        on_progress: OnProgress | None = None,
        on_log: OnLog | None = None,
        patience: str = "startup_timeout",
    ) -> None:
        """Describe it; nothing is made before `start`.

        Args:
            backend: where it runs.
            machine: what it runs in.
            follow: reads what it writes; then it is one of ours, which says when it is ready. None: it is ready when
                its `/health` answers.
            on_progress: told how far its start is.
            on_log: told each line that the server writes, if they can be followed.
            patience: the option that gives it more time to start, for the error that it was not enough.
        """
        self.machine = machine
        self.url = ""
        """Where it is reached; empty before `start` or `attach` has returned."""
        self.phase = "engine"
        """How far its start is."""
        self._backend = backend
        self._follow = follow
        self._on_progress = on_progress
        self._on_log = on_log
        self._patience = patience
        self.id = ""
        """Of its machine; empty before it is made, or found."""
        self._ran_before = True
        """Also as long as nobody knows: it is not for us to end then."""
        self._ending: asyncio.Task[Ending] | None = None
        self._following: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Server {self.machine.name} {self.url or self.phase}>"

    @property
    def api_key(self) -> str:
        """What its clients need."""
        return self.machine.secret_env[KEY_NAME]

    # --- its start ---

    async def start(self, seconds: float) -> None:
        """Make it run and wait until it is ready, whatever it was: new, paused, ended, or running already.

        Whatever raises, or a cancel, leaves nothing running that did not run before; what it has written stays until
        `stop`.

        Args:
            seconds: for all of it, the pull of the image included.

        Raises:
            ImageUnavailable: the image is not there and cannot be pulled.
            InvalidParams: a network or a volume that cannot be used.
            WorkspaceUnavailable: it did not start, or was not ready in time; with phase and its last words.
            EngineUnavailable, IsolationUnavailable: the engine fails, or cannot do what is asked for.
        """
        await self.let_go()
        try:
            async with asyncio.timeout(seconds) as limit:
                await self._start()
        except TimeoutError as exc:
            if isinstance(exc, AgentServerError) or not limit.expired():
                await to_its_end(self._halt())
                raise
            words = one_line(await self.last_words())
            await to_its_end(self._halt())
            raise WorkspaceUnavailable(
                f"the server of {self.machine.image} was not ready in time (phase {self.phase}){said(words)}; "
                f"give it more with {self._patience}",
                phase=self.phase,
            ) from exc
        except BaseException:
            await to_its_end(self._halt())
            raise

    async def attach(self, id: str, seconds: float) -> None:
        """Use one that was found: one that is paused or has ended goes on. What raises leaves it as it is.

        Args:
            id: of its machine.
            seconds: for all of it.

        Raises:
            As `start`.
        """
        self.id = id
        try:
            async with asyncio.timeout(seconds):
                await self._run(since_now=True)
                await self._reached()
        except BaseException as exc:
            await self.let_go()
            if not isinstance(exc, TimeoutError) or isinstance(exc, AgentServerError):
                raise
            raise WorkspaceUnavailable(
                f"the server of {self.machine.name} did not go on within {round(seconds, 1):g} s",
                phase=self.phase,
            ) from None

    async def _start(self) -> None:
        self.phase = "pull"
        self.id = await self._backend.create(self.machine, self._tell)
        self._ran_before = (await self._backend.inspect(self.id)).state == "running"
        ready = asyncio.get_running_loop().create_future()
        await self._run(since_now=False, ready=ready)
        self._tell("ready", 0, 1)
        assert self._ending is not None
        asking = asyncio.create_task(self._answers(ready))
        try:
            await asyncio.wait({asking, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise WorkspaceUnavailable(self.epitaph(), phase="ready")
            await asking
        finally:
            await cancel_and_wait(asking)
        self._tell("ready", 1, 1)

    async def _run(self, *, since_now: bool, ready: asyncio.Future[None] | None = None) -> None:
        self._tell("start", 0, 1)
        await self._backend.start(self.id)
        self._tell("start", 1, 1)
        self._ending = asyncio.create_task(
            self._backend.wait(self.id)
        )  # not before: one that has ended is dead
        if self._follow is not None and (ready is not None or self._on_log is not None):
            self._following = asyncio.create_task(self._pass_on(self._follow(self.id, since_now), ready))

    async def _answers(self, ready: asyncio.Future[None]) -> None:
        """Wait until it accepts connections, by what it says or by what its `/health` answers."""
        if self._follow is not None:
            await ready
        await self._reached()
        if self._follow is None:
            await _healthy(self.url)

    async def _reached(self) -> None:
        assert self._ending is not None
        try:
            self.url = await self._backend.endpoint(self.id, self.machine.ports[0])
        except WorkspaceUnavailable:
            if (await self._backend.inspect(self.id)).state == "running":
                raise
            await asyncio.wait({self._ending})
            raise WorkspaceUnavailable(self.epitaph(), phase="ready") from None

    async def _pass_on(self, lines: AsyncIterator[str], ready: asyncio.Future[None] | None) -> None:
        """Pass the server's lines on; the one that says that it is ready is not for people."""
        with suppress(AgentServerError):  # its end is noticed elsewhere
            async for line in lines:
                if _is_ready(line):
                    if ready is not None and not ready.done():
                        ready.set_result(None)
                    if self._on_log is None:
                        return
                elif self._on_log is not None:
                    await self._log(self._on_log, line)

    async def _log(self, told: OnLog, line: str) -> None:
        try:
            waiting = told(line)
            if inspect.isawaitable(waiting):
                await waiting
        except Exception:  # it is the user's; its error must not end the server
            logger.exception("on_log failed")

    def _tell(self, phase: str, done: int, total: int | None) -> None:
        self.phase = phase
        if self._on_progress is not None:
            try:
                self._on_progress(phase, done, total)
            except Exception:  # as above
                logger.exception("on_progress failed")

    # --- its life ---

    async def ended(self) -> Ending:
        """Wait until it has ended by itself, and return how. Cancelling ends the waiting only.

        Raises:
            EngineUnavailable: nobody can tell any more.
        """
        assert self._ending is not None, "it was not started"
        return await asyncio.shield(self._ending)

    def epitaph(self) -> str:
        """Return how it ended, and its last words, as one sentence. Only when `ended` has returned."""
        assert self._ending is not None
        return f"the server in {self.machine.image} ended: {self._ending.result().said}"

    async def port_url(self, port: int) -> str:
        """Return where one of its further ports is reached, as a URL.

        Raises:
            WorkspaceUnavailable: it was not asked for, or the machine does not run.
        """
        return await self._backend.endpoint(self.id, port)

    async def pause(self) -> None:
        """Let nothing in it run until `resume` or `start`. One that is gone or has ended is fine.

        Where the backend can freeze it connections stay, and calls wait.
        """
        await self._backend.pause(self.id or self.machine.name)

    async def resume(self) -> None:
        """Let it go on.

        Raises:
            NotFound, WorkspaceUnavailable: it is gone, or does not run.
        """
        await self._backend.resume(self.id)

    async def last_words(self) -> str:
        """Return the end of what it wrote; empty when nothing is known."""
        with suppress(AgentServerError):
            return await self._backend.logs(self.id)
        return ""

    # --- its end ---

    async def stop(self, grace: float = 0) -> None:
        """Remove it with all that it stores. A cancel waits for that.

        May be called again, also of one that never started.

        Args:
            grace: seconds that it may take to end by itself.

        Raises:
            EngineUnavailable: the engine does not answer, and it may still be there.
        """
        await to_its_end(self._stop(grace))

    async def let_go(self) -> None:
        """Leave it as it is: it can be found again."""
        await cancel_and_wait(self._ending, self._following)

    async def _stop(self, grace: float) -> None:
        await self.let_go()
        # What it stores has its name, and may be there when its container is not.
        if id := self.id if self.machine.storage is None else self.machine.name:
            await self._backend.stop(id, grace=grace)

    async def _halt(self) -> None:
        await self.let_go()
        if not self.id or self._ran_before:
            return
        with suppress(AgentServerError):  # there is an error already that says more
            await self._backend.stop(self.id, keep_data=True)


def _is_ready(line: str) -> bool:
    try:
        msgspec.json.decode(line, type=Ready)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


async def _healthy(url: str) -> None:
    """Ask a server until it answers; whoever waits for that says how long."""
    import aiohttp  # noqa: PLC0415  costs 0.3 s; see RuntimeClient
    from tenacity import (  # noqa: PLC0415
        AsyncRetrying,
        retry_if_exception_type,
        wait_random_exponential,
    )

    retrying = AsyncRetrying(
        wait=wait_random_exponential(multiplier=0.05, max=0.5),
        retry=retry_if_exception_type((aiohttp.ClientError, OSError, TimeoutError)),
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_SECONDS)) as http:

        async def ask() -> None:
            async with http.get(f"{url}/health", raise_for_status=True, allow_redirects=False):
                pass

        await retrying(ask)
