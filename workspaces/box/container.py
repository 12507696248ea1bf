"""A box in a hardened container: created from a request of our own, verified, claimed, and found again later.

Its record is written before it is created, and says which container it is. So whatever is killed at whichever
moment: whoever comes next finds it by its record, or the sweep finds it by its labels.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

from msgspec.structs import replace

from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    EngineUnavailable,
    IsolationUnavailable,
    NotFound,
    ProfileMismatch,
    WorkspaceLost,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.methods.workspace import Claim
from agent_sdk.protocol.results import Usage, WorkspaceInfo
from agent_sdk.protocol.specs import Sandbox
from agent_sdk.remote.connection import connect
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.docker.accounts import Accounts, check_targets
from workspaces.backend.docker.engine_info import usable_runtime
from workspaces.backend.docker.mounts import Source, sources
from workspaces.backend.docker.profiles import SEALED, create_body, temporary
from workspaces.box.contract import Box
from workspaces.box.folder import READY_LINE, BoxFolder, Record
from workspaces.box.parts import box_parts, command_environment
from workspaces.box.site import Site
from workspaces.box.verification import (
    OWN_KERNEL,
    Ending,
    box_differences,
    engine_differences,
    mount_differences,
)

if TYPE_CHECKING:
    from workspaces.backend.docker.engine import Death, Engine, Watch
    from workspaces.backend.docker.images import Image

READY_SECONDS = 30.0
CLAIM_SECONDS = 10.0
STOP_SECONDS = 5
LEAST_LINGER = 5.0
"""Seconds: between its claim and the connection of whoever uses it, it is alone for a moment."""
USAGE_SECONDS = 2.0
SHOWN_DIFFERENCES = 20


class BoxContainer(Box):
    """A box in a hardened container."""

    def __init__(
        self,
        site: Site,
        folder: BoxFolder,
        owner: str,
        spec: Sandbox,
        *,
        instance: str,
        waiting: Callable[[str, Sandbox], BoxContainer | None] = lambda owner, spec: None,
    ) -> None:
        """Describe it.

        Args:
            site: what it shares with others.
            folder: its own, made at its start and removed at its end.
            owner: whose workspace it serves.
            spec: what was asked for.
            instance: its name.
            waiting: returns a box that runs already and can become this one, if there is one.
        """
        self.instance = instance
        self.owner = owner
        self.spec = spec
        self._site = site
        self._folder = folder
        self._waiting = waiting
        self._record: Record | None = None
        self._image: Image | None = None
        self._accounts = Accounts()
        self._sources: tuple[Source, ...] = ()
        self._body: dict[str, Any] = {}
        self._id: str | None = None
        self._watch: Watch | None = None
        self._socket = -1
        self._ending = Ending()
        self._listener: Callable[[bool], None] = lambda frozen: None
        self._frozen = False
        self._unknown = False
        """Whether there may be a container on record that nobody could look for: then it is left alone."""
        self._expected: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def find(cls, site: Site, folder: BoxFolder, owner: str) -> Self | None:
        """Return the box whose record is in this folder; one that has ended is `ended`, and wants to be cleaned up.

        Raises:
            EngineUnavailable: nobody knows whether it lives.
        """
        record = folder.read()
        if record is None:
            return None
        box = cls(site, folder, owner, record.spec, instance=record.instance)
        try:
            await box._attach(record)
        except WorkspaceLost as exc:
            if not box._ending.words:
                box._ending = Ending(words=exc.message)
            if not box._ended.done():
                box._ended.set_result(None)
        return box

    def __repr__(self) -> str:
        return f"<BoxContainer {self.instance} {self._id[:12] if self._id else 'not started'}>"

    @property
    def url(self) -> str:
        """Where it listens: the very socket that was there when it was ready, whatever its name leads to now."""
        return f"unix:///proc/self/fd/{self._socket}"

    @property
    def token(self) -> str:
        return self._record.token if self._record else ""

    @property
    def ended(self) -> asyncio.Future[int | None]:
        """Done when it has ended, with its exit code where the engine knows it."""
        return self._ended

    @property
    def cause(self) -> str:
        return self._ending.cause

    def last_words(self) -> str:
        return self._ending.words

    # --- its start ---

    async def start(self) -> None:
        """Start it and wait until it can be connected to, as what was asked for.

        Raises:
            EngineUnavailable, ImageUnavailable, IsolationUnavailable, ProfileMismatch, WorkspaceUnavailable:
                it did not start; with phase, cause and what to do.
        """
        record = self._folder.read()
        if record is not None and record.instance == self.instance:
            await self._return_to(record)
            return
        try:
            if record is None and await self._take_over():
                return
            await self.launch()
            await self.claim()
        except BaseException:
            await self.end()
            raise

    async def _return_to(self, record: Record) -> None:
        """Find the container that could not be looked for when there was no engine."""
        try:
            await self._attach(record)
        except (EngineUnavailable, asyncio.CancelledError):
            self._unknown = True
            raise
        except BaseException:
            await self.end()
            raise

    async def _take_over(self) -> bool:
        """Become a box that waits already; those that turn out to be no good are ended."""
        engine = await self._site.engine()
        while (box := self._waiting(self.owner, self.spec)) is not None:
            try:
                await box.become(self)
            except BaseException as exc:
                await box.end()
                if isinstance(exc, AgentServerError):
                    continue
                raise
            self._record, self._image, self._body, self._id = box._record, box._image, box._body, box._id
            self._accounts = box._accounts
            self._socket, box._socket = box._socket, -1
            box.let_go()
            self._follow(engine)
            return True
        return False

    async def become(self, other: BoxContainer) -> None:
        """Give a launched box the identity and the place of another one, which has not started.

        Raises:
            WorkspaceUnavailable: it is no good any more; it has to be ended.
        """
        assert self._record is not None and self._image is not None
        engine = await self._site.engine()
        image = await engine.image(other.spec.image, pull="never", platform=other.spec.platform)
        if image.id != self._image.id:
            raise WorkspaceUnavailable("another image has its name by now", phase="claim")
        self._keep(replace(self._record, instance=other.instance, spec=other.spec))
        self._folder = await self._site.hand_over(self.owner, other.owner)
        self.owner, self.spec, self.instance = other.owner, other.spec, other.instance
        await self.claim()

    async def launch(self) -> None:
        """Have it run and listen, without an identity yet. What raises leaves it to `end`."""
        engine = await self._site.engine()
        if (left := self._folder.read()) is not None:
            await engine.remove(left.container)
        runtime = usable_runtime(engine.info, self.spec.runtime or self._site.preferred_runtime)
        binary = await self._site.runtime()
        self._image = await engine.image(self.spec.image, pull=self.spec.pull, platform=self.spec.platform)
        name = f"agent-box-{self.instance}"
        record = Record(
            instance=self.instance,
            container=name,
            spec=self.spec,
            image=self._image.id,
            runtime=runtime,
            token=secrets.token_urlsafe(24),
        )
        self._folder.make()
        is_task = self.spec.profile == "task"
        self._accounts = Accounts() if is_task else await self._site.accounts(self._image)
        self._folder.lay_out(content for _, content in self._accounts.files)
        folders = temporary(self.spec, self._image.id, self._image.volumes)[: 1 if is_task else None]
        await check_targets(
            engine, self._image, [*folders[1:], *(each.split(":")[1] for each in self.spec.mounts)]
        )
        self._sources = await in_thread(sources, self.spec.mounts, self._site.allowed_mounts)
        at_hand = self._site.at_hand(self.owner, self.spec, len(folders))
        async with at_hand as places, self._folder.ready() as said:
            limited = is_task and engine.info.limits_roots and places.size > 0
            parts = box_parts(
                self._image,
                self._accounts,
                tuple(zip(places.temporary, folders, strict=True)),
                self.spec,
                places,
                command=binary.entrypoint,
                linger=max(self._site.linger, LEAST_LINGER),
                labels=self._site.labels(self.owner),
                runtime=runtime,
                storage={"size": str(places.size)} if limited else {},
            )
            self._body = create_body(self.spec, parts)
            self._keep(
                replace(record, root_quota=engine.info.driver if limited else "none" if is_task else "")
            )
            self._id = await self._create(engine, name)
            self._follow(engine)
            try:
                await engine.start(self._id)
            except NotFound:
                raise WorkspaceUnavailable(
                    "somebody removed the container of the sandbox while it started; try again", phase="start"
                ) from None
            await self._listening(said)
        self._folder.seal(SEALED if is_task else None)
        self._socket = self._folder.open_socket()

    async def _create(self, engine: Engine, name: str) -> str:
        """Create it; where the engine cannot limit its root after all that is so, and said."""
        try:
            return await engine.create(name, self._body, platform=self.spec.platform)
        except IsolationUnavailable:
            if not self._body["HostConfig"]["StorageOpt"] or self._record is None:
                raise
        self._body["HostConfig"]["StorageOpt"] = {}
        self._keep(replace(self._record, root_quota="none"))
        return await engine.create(name, self._body, platform=self.spec.platform)

    async def claim(self) -> None:
        """Give it its identity, and see that all is in force that was asked for.

        Raises:
            ProfileMismatch: it is not; details: differences. WorkspaceUnavailable: it is no box.
        """
        assert self._record is not None and self._image is not None and self._id is not None
        env = command_environment(self._image, self._accounts, self.spec)
        env = {**env, **self._site.environment, **self.spec.env}
        call = Claim(op_id=new_id(), instance=self.instance, token=self.token, env=env)
        try:
            async with asyncio.timeout(CLAIM_SECONDS), connect(self.url) as connection:
                info = await connection.peer.call(call)
        except (AgentServerError, TimeoutError) as exc:  # whatever it says: it is no error of ours
            why = " ".join(str(exc).split())[:200] or f"not within {CLAIM_SECONDS:.0f} s"
            raise WorkspaceUnavailable(f"the box did not answer: {why}", phase="claim") from None
        inspected = await (await self._site.engine()).inspect(self._id)
        differences = engine_differences(self._body, inspected) + box_differences(self._body, info.profile)
        if self._record.runtime not in OWN_KERNEL:  # one of those has numbers of its own
            differences += mount_differences(self._sources, info.profile)
        if differences:
            raise ProfileMismatch(
                f"the sandbox is not what was asked for and was ended: {'; '.join(differences[:3])}",
                phase="profile",
                differences=differences[:SHOWN_DIFFERENCES],
            )
        self._keep(replace(self._record, claimed=True))

    def _keep(self, record: Record) -> None:
        self._record = record
        self._folder.write(record)

    async def _listening(self, said: asyncio.Future[bytes]) -> None:
        """Wait until the box listens, or has died."""
        reasons: list[asyncio.Future[Any]] = [said, self._ended]
        await asyncio.wait(reasons, timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if self._ended.done():
            raise WorkspaceUnavailable(f"the sandbox ended at its start: {self._ending.words}", phase="ready")
        if not said.done():
            raise WorkspaceUnavailable(
                f"the sandbox was not ready after {READY_SECONDS:.0f} s", phase="ready"
            )
        if said.result() != READY_LINE:
            raise WorkspaceUnavailable("what started in the sandbox is no box", phase="ready")

    async def _attach(self, record: Record) -> None:
        """Go on with a container that was there before us; a frozen one wakes up.

        Raises:
            WorkspaceLost: it has ended, or was never whole.
            EngineUnavailable: nobody knows.
        """
        self._record = record
        try:
            await self._reach(await self._site.engine(), record)
        except (EngineUnavailable, WorkspaceLost):
            raise
        except AgentServerError as exc:
            raise WorkspaceLost(f"it cannot be used any more: {exc.message}") from None

    async def _reach(self, engine: Engine, record: Record) -> None:
        try:
            inspected = await engine.inspect(record.container)
        except NotFound:
            raise WorkspaceLost("its container was removed") from None
        self._id, state = str(inspected["Id"]), inspected["State"]
        self._follow(engine)
        if state["Status"] == "created":  # it cannot die
            raise WorkspaceLost("its server ended before it was started")
        if not state["Running"]:
            await self._ended
            raise WorkspaceLost(self._ending.words)
        if not record.claimed:
            raise WorkspaceLost("its server ended before it was ready")
        if state["Paused"]:
            await engine.unpause(self._id)
        self._socket = self._folder.open_socket()

    # --- its end ---

    async def end(self) -> None:
        await asyncio.shield(asyncio.ensure_future(self._end()))

    def kill(self) -> None:
        if self._id is not None:
            self._spawn(self._kill(self._id))

    def let_go(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._socket >= 0:
            os.close(self._socket)
            self._socket = -1

    async def _end(self) -> None:
        """What the engine does not remove now, because it is away, the sweep removes later."""
        if self._unknown:
            self.let_go()
            return
        if self._id is not None:
            with suppress(AgentServerError):
                engine = await self._site.engine()
                if not self._ended.done() and not self._frozen:  # a frozen one would not hear it
                    with suppress(AgentServerError):
                        await engine.stop(self._id, STOP_SECONDS)
                await engine.remove(self._id)
        self.let_go()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._ended.done():
            self._ended.set_result(None)
        self._folder.remove()
        await self._site.tidy(self.owner)

    async def _kill(self, id: str) -> None:
        with suppress(AgentServerError):
            await (await self._site.engine()).kill(id)

    def _follow(self, engine: Engine) -> None:
        """Notice its death, and learn what it said last before anybody hears of it."""
        assert self._id is not None
        self._watch = watch = engine.watch(self._id)

        def died(death: asyncio.Future[Death]) -> None:
            if not death.cancelled():
                self._spawn(self._learn(engine, death.result()))

        watch.died.add_done_callback(died)
        watch.on_change(self._changed)

    async def _learn(self, engine: Engine, death: Death) -> None:
        said = ""
        with suppress(AgentServerError, OSError):
            said = await engine.logs(self._id or "")
        self._ending = Ending.of(death, self.spec, said)
        if not self._ended.done():
            self._ended.set_result(death.exit_code)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- while it lives ---

    async def freeze(self) -> None:
        engine, id = await self._site.engine(), self._running
        with self._expecting("pause"):
            await engine.pause(id)
            self._frozen = True

    async def thaw(self) -> None:
        engine, id = await self._site.engine(), self._running
        with self._expecting("unpause"):
            await engine.unpause(id)
            self._frozen = False

    @contextmanager
    def _expecting(self, change: str) -> Iterator[None]:
        """The engine will tell of what we do ourselves, maybe much later: that is no news."""
        self._expected[change] += 1
        try:
            yield
        except BaseException:
            self._expected[change] -= 1
            raise

    def follow(self, listener: Callable[[bool], None]) -> None:
        self._listener = listener

    async def completed(self, info: WorkspaceInfo) -> WorkspaceInfo:
        """Return what it says of itself with image, runtime and usage, as far as the engine tells them now."""
        usage, (mechanism, occupied, most) = Usage(), self._site.disk(self.owner)
        with suppress(AgentServerError, TimeoutError):
            async with asyncio.timeout(USAGE_SECONDS):
                usage = await (await self._site.engine()).stats(self._running)
        usage = replace(usage, disk=occupied, disk_max=most)
        runtime, root = (self._record.runtime, self._record.root_quota) if self._record else ("none", "")
        return replace(
            info,
            image=self.spec.image,
            isolation=runtime,
            sandbox=self.spec.profile,
            disk_quota=mechanism,
            root_quota=root,
            usage=usage,
        )

    def _changed(self, change: str) -> None:
        if self._expected[change]:
            self._expected[change] -= 1
        elif change in ("pause", "unpause"):
            self._frozen = change == "pause"
            self._listener(self._frozen)

    @property
    def _running(self) -> str:
        if self._id is None:
            raise WorkspaceUnavailable("the sandbox does not run", phase="start")
        return self._id
