"""A box in a hardened container: created from a request of our own, verified, claimed, and found again later.

Its record is written before it is created, and says which container it is. So whatever is killed at whichever
moment: whoever comes next finds it by its record, or the sweep finds it by its labels.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Self

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
from workspaces.backend.contract import Backend, Ending, Image, Machine, State
from workspaces.box.contract import Box
from workspaces.box.folder import READY_LINE, Record
from workspaces.box.host import SandboxHost
from workspaces.box.machine import (
    Accounts,
    Source,
    box_differences,
    box_machine,
    check_targets,
    command_environment,
    mount_differences,
    sources,
    temporary,
)

READY_SECONDS = 30.0
CLAIM_SECONDS = 10.0
STOP_SECONDS = 5
LEAST_LINGER = 5.0
"""Seconds: between its claim and the connection of whoever uses it, it is alone for a moment."""
USAGE_SECONDS = 2.0
SHOWN_DIFFERENCES = 20
_SIGNALS: Mapping[int | None, str] = {128 + 9: "SIGKILL", 128 + 15: "SIGTERM"}
SEALED = 4_000_000_000
"""Owns the folder of the socket of a task, whose commands may be anybody with a lower number."""


class _Made(NamedTuple):
    """What the machine of a box was made from."""

    image: Image
    accounts: Accounts
    mounts: tuple[Source, ...]
    """What is to be mounted of the server's machine."""
    machine: Machine


class BoxContainer(Box):
    """A box in a hardened container."""

    def __init__(
        self,
        host: SandboxHost,
        owner: str,
        spec: Sandbox,
        *,
        instance: str,
        waiting: Callable[[str, Sandbox], BoxContainer | None] = lambda owner, spec: None,
    ) -> None:
        """Describe it.

        Args:
            host: what it shares with others.
            owner: whose workspace it serves.
            spec: what was asked for.
            instance: its name.
            waiting: returns a box that runs already and can become this one, if there is one.
        """
        self.instance = instance
        self.owner = owner
        self.spec = spec
        self._host = host
        self._folder = host.folder(owner)
        self._waiting = waiting
        self._record: Record | None = None
        self._made: _Made | None = None
        self._id: str | None = None
        self._watching: asyncio.Task[None] | None = None
        self._socket = -1
        self._cause, self._words = "engine", ""
        self._listener: Callable[[bool], None] = lambda frozen: None
        self._frozen = False
        self._unknown = False
        """Whether there may be a container on record that nobody could look for: then it is left alone."""
        self._changing = asyncio.Lock()
        """Held while it is frozen or let go on by us, or looked at."""
        self._killing: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def find(cls, host: SandboxHost, owner: str) -> Self | None:
        """Return the box of this owner that is on record; one that has ended is `ended`, and wants to be cleaned up.

        Raises:
            EngineUnavailable: nobody knows whether it lives.
        """
        record = host.folder(owner).read()
        if record is None:
            return None
        box = cls(host, owner, record.spec, instance=record.instance)
        try:
            await box._attach(record)
        except WorkspaceLost as exc:
            box._words = box._words or exc.message
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
        return self._cause

    def last_words(self) -> str:
        return self._words

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
        backend = await self._host.backend()
        while (box := self._waiting(self.owner, self.spec)) is not None:
            try:
                await box.become(self)
            except BaseException as exc:
                await box.end()
                if isinstance(exc, AgentServerError):
                    continue
                raise
            self._record, self._made, self._id = box._record, box._made, box._id
            self._socket, box._socket = box._socket, -1
            box.let_go()
            self._follow(backend)
            return True
        return False

    async def become(self, other: BoxContainer) -> None:
        """Give a launched box the identity and the place of another one, which has not started.

        Raises:
            WorkspaceUnavailable: it is no good any more; it has to be ended.
        """
        assert self._record is not None and self._made is not None
        backend = await self._host.backend()
        image = await backend.image(other.spec.image, pull="never", platform=other.spec.platform)
        if image.id != self._made.image.id:
            raise WorkspaceUnavailable("another image has its name by now", phase="claim")
        self._keep(replace(self._record, instance=other.instance, spec=other.spec))
        self._folder = await self._host.hand_over(self.owner, other.owner)
        self.owner, self.spec, self.instance = other.owner, other.spec, other.instance
        await self.claim()

    async def launch(self) -> None:
        """Have it run and listen, without an identity yet. What raises leaves it to `end`."""
        backend = await self._host.backend()
        if (left := self._folder.read()) is not None:
            await backend.stop(left.container)
        runtime = self.spec.runtime or self._host.options.runtime
        backend.check_runtime(runtime)
        binary = await self._host.runtime()
        image = await backend.image(self.spec.image, pull=self.spec.pull, platform=self.spec.platform)
        self._folder.make()
        is_task = self.spec.profile == "task"
        accounts = Accounts() if is_task else await self._host.accounts(image)
        self._folder.lay_out(content for _, content in accounts.files)
        folders = temporary(self.spec, image)[: 1 if is_task else None]
        mounted = [each.split(":")[1] for each in self.spec.mounts]
        await check_targets(backend, image, [*folders[1:], *mounted])
        mounts = await in_thread(sources, self.spec.mounts, self._host.options.mounts)
        at_hand = self._host.at_hand(self.owner, self.spec, len(folders))
        async with at_hand as places, self._folder.ready() as said:
            machine = box_machine(
                self.spec,
                image,
                accounts,
                places,
                folders,
                name=f"agent-box-{self.instance}",
                labels=self._host.labels(self.owner),
                command=binary.entrypoint,
                linger=max(self._host.options.linger, LEAST_LINGER),
                runtime=runtime,
            )
            self._id = await self._create(backend, _Made(image, accounts, mounts, machine))
            self._follow(backend)
            try:
                await backend.start(self._id)
            except NotFound:
                raise WorkspaceUnavailable(
                    "somebody removed the container of the sandbox while it started; try again", phase="start"
                ) from None
            await self._listening(said)
        self._folder.seal(SEALED if is_task else None)
        self._socket = self._folder.open_socket()

    async def _create(self, backend: Backend, made: _Made) -> str:
        """Put it on record and create it; where its root cannot be limited after all that is so, and said."""
        self._made, limited = made, made.machine.root_size is not None
        self._keep(
            Record(
                instance=self.instance,
                container=made.machine.name,
                spec=self.spec,
                image=made.image.id,
                runtime=made.machine.runtime or "",
                token=secrets.token_urlsafe(24),
                root_quota=backend.root_limit if limited else "none" if self.spec.profile == "task" else "",
            )
        )
        try:
            return await backend.create(made.machine)
        except IsolationUnavailable:
            if not limited:
                raise
        return await self._create(backend, made._replace(machine=replace(made.machine, root_size=None)))

    async def claim(self) -> None:
        """Give it its identity, and see that all is in force that was asked for.

        Raises:
            ProfileMismatch: it is not; details: differences. WorkspaceUnavailable: it is no box.
        """
        assert self._record is not None and self._made is not None and self._id is not None
        made = self._made
        env = command_environment(made.image, made.accounts, self.spec)
        env = {**env, **self._host.options.environment, **self.spec.env}
        call = Claim(op_id=new_id(), instance=self.instance, token=self.token, env=env)
        try:
            async with asyncio.timeout(CLAIM_SECONDS), connect(self.url) as connection:
                info = await connection.peer.call(call)
        except (AgentServerError, TimeoutError) as exc:  # whatever it says: it is no error of ours
            why = " ".join(str(exc).split())[:200] or f"not within {CLAIM_SECONDS:.0f} s"
            raise WorkspaceUnavailable(f"the box did not answer: {why}", phase="claim") from None
        backend = await self._host.backend()
        differences = await backend.differences(self._id, made.machine)
        own_kernel = made.machine.runtime in backend.own_kernels
        differences += box_differences(made.machine, info.profile, own_kernel=own_kernel)
        if not own_kernel:  # one of those has numbers of its own
            differences += mount_differences(made.mounts, info.profile)
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
            raise WorkspaceUnavailable(f"the sandbox ended at its start: {self._words}", phase="ready")
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
            backend = await self._host.backend()
            found = await backend.inspect(record.container)
            self._id = found.id
            self._follow(backend)
            if found.state == "created":  # it cannot die
                raise WorkspaceLost("its server ended before it was started")
            if found.state == "ended":
                await self._ended
                raise WorkspaceLost(self._words)
            if not record.claimed:
                raise WorkspaceLost("its server ended before it was ready")
            if found.state == "paused":
                await backend.resume(found.id)
            self._socket = self._folder.open_socket()
        except (EngineUnavailable, WorkspaceLost):
            raise
        except NotFound:
            raise WorkspaceLost("its container was removed") from None
        except AgentServerError as exc:
            raise WorkspaceLost(f"it cannot be used any more: {exc.message}") from None

    # --- its end ---

    async def end(self) -> None:
        await asyncio.shield(asyncio.ensure_future(self._end()))

    def kill(self) -> None:
        if self._id is not None and (self._killing is None or self._killing.done()):
            self._killing = asyncio.create_task(self._kill(self._id))

    def let_go(self) -> None:
        if self._watching is not None and not self._ended.done():
            self._watching.cancel()
        self._watching = None
        self._host.changes.pop(self._id or "", None)
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
                backend = await self._host.backend()
                lives = not self._ended.done() and not self._frozen  # a frozen one would not hear it
                await backend.stop(self._id, grace=STOP_SECONDS if lives else 0)
        self.let_go()
        if self._killing is not None:
            self._killing.cancel()
        if not self._ended.done():
            self._ended.set_result(None)
        self._folder.remove()
        await self._host.tidy(self.owner)

    async def _kill(self, id: str) -> None:
        with suppress(AgentServerError):
            await (await self._host.backend()).stop(id, keep_data=True)

    def _follow(self, backend: Backend) -> None:
        """Notice its death, and learn what it said last before anybody hears of it."""
        assert self._id is not None
        self._watching = asyncio.create_task(self._watch(backend, self._id))
        self._host.changes[self._id] = self._changed

    async def _watch(self, backend: Backend, id: str) -> None:
        ending = await backend.wait(id)
        reason = _reason(ending, self.spec)
        self._cause, self._words = ending.cause, f"{reason}: {ending.words}" if ending.words else reason
        if not self._ended.done():
            self._ended.set_result(ending.exit_code)

    # --- while it lives ---

    async def freeze(self) -> None:
        backend, id = await self._host.backend(), self._running
        async with self._changing:
            await backend.pause(id)
            # To pause what has ended is fine to a backend; who wants a box to keep still has to know.
            if (await backend.inspect(id)).state != "paused":
                raise WorkspaceUnavailable("the sandbox has ended, so it cannot be paused", phase="pause")
            self._frozen = True

    async def thaw(self) -> None:
        backend, id = await self._host.backend(), self._running
        async with self._changing:
            await backend.resume(id)
            self._frozen = False

    def follow(self, listener: Callable[[bool], None]) -> None:
        self._listener = listener

    async def completed(self, info: WorkspaceInfo) -> WorkspaceInfo:
        """Return what it says of itself with image, runtime and usage, as far as the engine tells them now."""
        usage, disks = Usage(), self._host.disks
        with suppress(AgentServerError, TimeoutError):
            async with asyncio.timeout(USAGE_SECONDS):
                usage = await (await self._host.backend()).usage(self._running)
        occupied, most = disks.used(self.owner) or (None, None)
        usage = replace(usage, disk=occupied, disk_max=most)
        runtime, root = (self._record.runtime, self._record.root_quota) if self._record else ("none", "")
        return replace(
            info,
            image=self.spec.image,
            isolation=runtime,
            sandbox=self.spec.profile,
            disk_quota=disks.mechanism,
            root_quota=root,
            usage=usage,
        )

    async def _changed(self, state: State) -> None:
        """Look at it when a change is told that is none of ours. One of ours may be told much later, or never."""
        if (state == "paused") == self._frozen:
            return
        async with self._changing:
            with suppress(
                AgentServerError
            ):  # what was missed then is told again, as `Backend.events` promises
                state = (await (await self._host.backend()).inspect(self._running)).state
                if state in ("paused", "running") and (state == "paused") != self._frozen:
                    self._frozen = state == "paused"
                    self._listener(self._frozen)

    @property
    def _running(self) -> str:
        if self._id is None:
            raise WorkspaceUnavailable("the sandbox does not run", phase="start")
        return self._id


def _reason(ending: Ending, spec: Sandbox) -> str:
    """Why a sandbox ended, as a sentence for people."""
    if ending.cause == "oom":
        return f"it ran out of memory ({spec.memory})"
    if ending.cause == "killed":
        return f"it was killed ({_SIGNALS.get(ending.exit_code, 'a signal')})"
    if ending.exit_code == 0:
        return "it ended by itself, because nobody was connected to it any more"
    return ending.reason
