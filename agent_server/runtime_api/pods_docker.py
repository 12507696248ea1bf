"""Pods that are containers of this machine's engine.

The container stays when its server ends or is paused, and is started again; its data is in a volume of its own.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

from tenacity import AsyncRetrying, retry_if_exception, stop_before_delay, wait_random_exponential

from agent_sdk.protocol.errors import AgentServerError, EngineUnavailable, WorkspaceUnavailable
from agent_sdk.workspace.disk import in_thread
from agent_server.logs import Logs
from agent_server.refusal import TRY_LATER, StartRefused
from agent_server.runtime_api.pods import Pod, Pods, PodSpec
from workspaces.backend.docker.engine import Engine
from workspaces.backend.docker.labels import INSTANCE, ROLE, SERVER
from workspaces.backend.docker.profiles import KEY_NAME, SERVER_PORT, ServerSpec, Volume
from workspaces.backend.docker.reach import HostPaths
from workspaces.backend.docker.server_container import ServerContainer
from workspaces.backend.records import instance_of
from workspaces.box.disks import Disks
from workspaces.box.sweep import Sweep

INSTANCE_FILE = "instance"
OUR_START = "/opt/agent-server/bin/start"
"""How the command of our own image begins."""
KEY_NAMES = (KEY_NAME, "SESSION_API_KEY", "OH_SESSION_API_KEYS_0")
"""Where servers look for their key, ours and others."""
DATA = "/data"
"""Where the server in the image keeps what lasts."""
TAKEN_SECONDS = 15.0
"""How long the name of a container may be taken by one that cannot be seen yet."""
PULL: Mapping[str, Literal["missing", "always", "never"]] = {
    "IfNotPresent": "missing",
    "Always": "always",
    "Never": "never",
}


class DockerPod(Pod):
    """A pod that is a container."""

    def __init__(
        self, engine: Engine, spec: PodSpec, instance: str, network: str | None, disks: Disks
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._disks = disks
        self._labels = {INSTANCE: instance}
        self._network = network
        self._name, self._volume = _names(spec.runtime_id)
        self._container: ServerContainer | None = None

    def __repr__(self) -> str:
        return f"<DockerPod {self._name}>"

    @property
    def url(self) -> str:
        return self._container.url if self._container is not None else ""

    async def start(self, seconds: float) -> None:
        await self.let_go()
        # The engine may still be busy with what a server asked for that was killed.
        retrying = AsyncRetrying(
            wait=wait_random_exponential(multiplier=0.1, max=1),
            stop=stop_before_delay(TAKEN_SECONDS),
            retry=retry_if_exception(_is_taken),
            reraise=True,
        )
        await retrying(self._start, seconds)

    async def _start(self, seconds: float) -> None:
        found = await ServerContainer.find(self._engine, self._name)
        if found is None:
            await self._make(seconds)
            return
        self._container = found
        if self._disks.has(self._spec.runtime_id):
            async with self._disks.at_hand(self._spec.runtime_id):
                await self._start_again(found, seconds)
        else:
            await self._start_again(found, seconds)

    async def _start_again(self, found: ServerContainer, seconds: float) -> None:
        try:
            await self._go_on(found, seconds)
        except BaseException:
            with suppress(AgentServerError):
                await self._engine.stop(found.id)
            raise

    async def died(self) -> str:
        assert self._container is not None, "it was not started"
        return (await asyncio.shield(self._container.died)).reason

    async def pause(self) -> None:
        found = await ServerContainer.find(self._engine, self._name)
        if found is not None:
            with suppress(WorkspaceUnavailable):
                await found.pause()

    async def end(self) -> None:
        await self.let_go()
        found = await ServerContainer.find(self._engine, self._name)
        if found is not None:
            await found.stop()
        await self._engine.remove_volume(self._volume)
        await self._disks.remove(self._spec.runtime_id)

    async def let_go(self) -> None:
        if self._container is not None:
            await self._container.let_go()

    async def last_words(self) -> str:
        with suppress(AgentServerError):
            if self._container is not None and self._container.id:
                return await self._engine.logs(self._container.id)
        return ""

    async def _make(self, seconds: float) -> None:
        async with AsyncExitStack() as stack:
            data = self._volume
            if self._spec.disk is not None and self._disks.mechanism != "none":
                await self._disks.make(self._spec.runtime_id, self._spec.disk)
                data = str(await stack.enter_async_context(self._disks.at_hand(self._spec.runtime_id)))
            else:
                await self._engine.create_volume(self._volume, {"Labels": {**self._labels, ROLE: SERVER}})
            await self._make_with(data, seconds)

    async def _make_with(self, data: str, seconds: float) -> None:
        spec = self._spec
        words = spec.command if isinstance(spec.command, list) else shlex.split(spec.command or "")
        ours = not words or words[0] == OUR_START
        # In our own image the server keeps its user, and it is commands that run as another one.
        self._container = ServerContainer(
            self._engine,
            ServerSpec(
                image=spec.image,
                name=self._name,
                env=spec.environment,
                command_env=spec.environment if ours else {},
                command=tuple(words) or None,
                port=_port(words),
                working_dir=spec.working_dir,
                group=None if ours else spec.fs_group,
                key_names=KEY_NAMES,
                user=None if ours else spec.run_as_user,
                box_user=spec.run_as_user if ours else None,
                volumes=(Volume(data, DATA),),
                network=self._network,
                memory=f"{spec.memory}b",
                cpus=spec.cpus,
                runtime=spec.runtime_class,
                labels=self._labels,
                pull=PULL[spec.image_pull_policy],
            ),
            foreign=True,
            patience="start_seconds",
        )
        self._container.api_key = spec.api_key
        await self._container.start(seconds)

    async def _go_on(self, container: ServerContainer, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await container.attach(seconds)
                await container.answers()
        except TimeoutError:
            raise WorkspaceUnavailable(
                f"the server in {self._name} did not answer within {seconds:g} s", phase="ready"
            ) from None


class DockerPods(Pods):
    """Makes pods that are containers of this machine's engine."""

    paused_keeps_memory = True

    def __init__(self, engine: Engine, instance: str, network: str | None, logs: Logs, disks: Disks) -> None:
        """Take the engine, the label of everything that is made on it, the network of the containers, their disks."""
        self._engine = engine
        self._disks = disks
        self._instance = instance
        self._network = network
        self._log = logs.log

    @classmethod
    @asynccontextmanager
    async def opened(cls, folder: Path, logs: Logs, network: str | None) -> AsyncIterator[DockerPods]:
        """Reach the engine of this machine for the length of the block.

        Args:
            folder: where the runtimes are kept.
            logs: what is swept up is told there.
            network: of the containers; None: the engine's default.

        Raises:
            StartRefused: there is no engine that answers.
        """
        await in_thread(lambda: folder.mkdir(mode=0o700, parents=True, exist_ok=True))
        instance = await in_thread(instance_of, folder / INSTANCE_FILE)
        async with AsyncExitStack() as stack:
            try:
                engine = await stack.enter_async_context(Engine())
            except EngineUnavailable as exc:
                raise StartRefused(f"runtime_api is docker: {exc}", exit_code=TRY_LATER) from None
            disks = Disks(folder.with_name("runtime-disks"))
            await disks.prepare(unseen=(await HostPaths.find(engine)).unseen)
            if disks.mechanism == "none":
                logs.log.warning("runtime_disks_unlimited", reason=disks.why)
            yield cls(engine, instance, network, logs, disks)

    def pod(self, spec: PodSpec) -> DockerPod:
        return DockerPod(self._engine, spec, self._instance, self._network, self._disks)

    def disk(self, wanted: int | None) -> int | None:
        return None if self._disks.mechanism == "none" else wanted

    async def sweep(self, known: Callable[[], Collection[str]]) -> None:
        sweep = Sweep(
            self._engine,
            self._instance,
            lambda: {name for runtime_id in known() for name in _names(runtime_id)},
            on_removed=self._removed,
            on_problem=self._problem,
        )
        await sweep.once()
        await self._disks.keep(lambda owner: owner in known())

    def _removed(self, kind: str, name: str) -> None:
        self._log.warning("leftover_removed", kind=kind, name=name)

    def _problem(self, problem: Exception) -> None:
        self._log.warning("runtimes_not_swept", problem=str(problem))


def _names(runtime_id: str) -> tuple[str, str]:
    """Return the names of the container and of the volume of a runtime."""
    return f"agent-server-{runtime_id}", f"agent-data-{runtime_id}"


def _port(command: Sequence[str]) -> int:
    """Where the server that this command starts listens: what follows `--port`, as all of them call it."""
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name == "--port":
            value = value or next(iter(command[at + 1 :]), "")
            if value.isdecimal() and 0 < int(value) <= 65535:
                return int(value)
    return SERVER_PORT


def _is_taken(error: BaseException) -> bool:
    return isinstance(error, WorkspaceUnavailable) and error.details.get("status") == 409
