"""The container engine as a backend: a machine is a container, and what it stores a volume or a disk of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tenacity import AsyncRetrying, retry_if_exception, stop_before_delay, wait_random_exponential

from agent_sdk.cancellation import to_its_end
from agent_sdk.ids import new_id
from agent_sdk.protocol.errors import (
    AgentServerError,
    ImageUnavailable,
    InvalidParams,
    NotFound,
    WorkspaceUnavailable,
)
from agent_sdk.protocol.results import Usage
from agent_sdk.workspace.disk import in_thread
from workspaces.backend.contract import (
    Backend,
    Can,
    Ending,
    Facts,
    Found,
    Image,
    Look,
    Machine,
    Mount,
    OnProgress,
    Pull,
    State,
    one_line,
)
from workspaces.backend.disks import Disks
from workspaces.backend.docker.engine import Engine
from workspaces.backend.docker.engine_info import GVISOR, usable_runtime
from workspaces.backend.docker.profiles import Propagation, box_body, differences, folders, server_body
from workspaces.backend.docker.reach import HostPaths, find_reach
from workspaces.backend.labels import EXPIRES, INSTANCE, NAME, OURS, ROLE, SERVER, has

OWN_IMAGE = "agent-server"
TAKEN_SECONDS = 15.0
"""How long the name of a container may be taken by one that cannot be seen yet."""
DATA = "-data"
"""Ends the name of the volume in which a machine stores what it stores."""
FORMER_DATA = "agent-data-"
"""Began that name before; the name of the machine followed, without its prefix."""
_STATES: Mapping[str, State] = {
    "created": "created",
    "running": "running",
    "restarting": "running",
    "paused": "paused",
}
_CHANGES: Mapping[str, State] = {
    "create": "created",
    "start": "running",
    "unpause": "running",
    "pause": "paused",
    "die": "ended",
    "destroy": "ended",
}
_FULL_ID = 64
LOOK_SECONDS = 60
"""For so long a container of which nothing runs may be there, while somebody looks into its image."""


class DockerBackend(Backend):
    """Machines that are containers of one engine."""

    own_kernels = frozenset({GVISOR})

    def __init__(
        self,
        engine: Engine,
        *,
        disks: Disks | None = None,
        paths: HostPaths | None = None,
        prefix: str = "",
    ) -> None:
        """Take what machines need.

        Args:
            engine: one that answers.
            disks: where machines store what is limited; None: nothing can be.
            paths: what the engine calls the folders of this process; None: the same.
            prefix: what the names of all machines begin with. What they stored had names without it before, and is
                theirs still; empty: there is nothing from before.
        """
        self._engine = engine
        self._disks = disks
        self._prefix = prefix
        self._paths = paths or HostPaths()
        self.unseen = self._paths.unseen
        self.cpus, self.memory = engine.info.cpus, engine.info.memory
        self.root_limit = engine.info.driver if engine.info.limits_roots else ""
        self._limits = disks is not None and disks.mechanism != "none"
        can: set[Can] = {"freeze", "folders", "isolate"}
        self.can = frozenset[Can](can | {"disk_limit"} if self._limits else can)

    def __repr__(self) -> str:
        return f"<DockerBackend at {self._engine.where}>"

    def check_runtime(self, name: str) -> None:
        usable_runtime(self._engine.info, name)

    # --- images ---

    async def image(self, name: str, *, pull: Pull = "missing", platform: str | None = None) -> Image:
        return await self._engine.image(name, pull=pull, platform=platform)

    @asynccontextmanager
    async def looking(self, image: Image) -> AsyncIterator[Look]:
        body = {
            "Image": image.id,
            "Cmd": ["nothing"],
            "NetworkDisabled": True,
            "Labels": {INSTANCE: "look", EXPIRES: str(int(time.time()) + LOOK_SECONDS)},
        }
        container = await self._engine.create(f"agent-look-{new_id()}", body)
        try:
            yield partial(self._engine.read_file, container)
        finally:
            with suppress(AgentServerError):  # its time is over in a minute, and then the sweep finds it
                await self._engine.remove(container)

    # --- its start ---

    async def create(self, machine: Machine, on_progress: OnProgress | None = None) -> str:
        # The engine may still be busy with what was asked for by somebody who was killed.
        retrying = AsyncRetrying(
            wait=wait_random_exponential(multiplier=0.1, max=1),
            stop=stop_before_delay(TAKEN_SECONDS),
            retry=retry_if_exception(_is_taken),
            reraise=True,
        )
        return await retrying(self._create, machine, on_progress or _nobody)

    async def _create(self, machine: Machine, tell: OnProgress) -> str:
        with suppress(NotFound):
            found = await self.inspect(machine.name)
            if found.labels.get(INSTANCE) != machine.labels.get(INSTANCE):
                raise InvalidParams(f"name: there is a container {machine.name} of somebody else")
            return found.id
        tell("engine", 0, 1)
        make_body = await self._body(machine)
        await self._check_volumes(machine)
        tell("engine", 1, 1)
        await self._have_image(machine, tell)
        tell("create", 0, 1)
        async with self._stored(machine) as storage:
            id = await self._engine.create(machine.name, make_body(storage), platform=machine.platform)
            if machine.group is not None:
                await self._give(id, folders(machine, storage), machine.group)
        tell("create", 1, 1)
        return id

    async def _body(self, machine: Machine) -> Callable[[str | None], dict[str, Any]]:
        """Find out what the engine is asked for, by where the machine stores what it stores."""
        if machine.profile != "server":
            return lambda storage: box_body(machine, self._place)
        reach = await find_reach(self._engine, machine.network)
        return lambda storage: server_body(machine, storage=storage, bind=reach.bind, network=reach.network)

    def _place(self, mount: Mount) -> tuple[str, Propagation]:
        if not mount.here:
            return mount.source, "rprivate"
        source = self._paths.of(Path(mount.source))
        is_the_engines = Path(source).is_relative_to(self._engine.info.root_dir or "/")
        return source, "rslave" if is_the_engines else "rprivate"

    async def _give(self, id: str, mounts: Iterable[Mount], group: int) -> None:
        try:
            for mount in mounts:
                await self._engine.give_to_group(id, mount.target, group)
        except BaseException:
            with suppress(AgentServerError):
                await to_its_end(self._engine.remove(id))
            raise

    async def _check_volumes(self, machine: Machine) -> None:
        """A named volume that does not exist would be made by the engine, and stay."""
        wanted = {mount.source for mount in machine.mounts if not mount.is_folder}
        missing = wanted - {volume["Name"] for volume in await self._engine.volumes({})} if wanted else None
        if missing:
            name = min(missing)
            raise InvalidParams(f"volumes: there is no volume {name}; make it: docker volume create {name}")

    async def _have_image(self, machine: Machine, tell: OnProgress) -> None:
        """Pull the image where it is missing. Nobody publishes ours under its own name: that one is made."""
        own = machine.image.partition(":")[0] == OWN_IMAGE
        pull = "never" if own else machine.pull
        try:
            await self._engine.image(machine.image, pull=pull, platform=machine.platform, on_progress=tell)
        except ImageUnavailable as exc:
            if not own:
                raise
            raise ImageUnavailable(f"{exc}; make it: make image", **exc.details) from None

    @asynccontextmanager
    async def _stored(self, machine: Machine) -> AsyncIterator[str | None]:
        """Where a machine stores what it stores, made where it is missing."""
        if machine.storage is None:
            yield None
        elif machine.storage.size is not None and self._disks is not None and self._limits:
            disk = self._disk(machine.name) or machine.name
            await self._disks.make(disk, machine.storage.size)
            async with self._disks.at_hand(disk) as folder:
                yield str(folder)
        else:
            there = await self._volumes(machine.name, machine.labels) if self._prefix else []
            volume = max(there, default=f"{machine.name}{DATA}")  # that of today, if there are both
            await self._engine.create_volume(volume, {"Labels": {**machine.labels, ROLE: SERVER}})
            yield volume

    def _disk(self, name: str) -> str | None:
        """Whose name the disk of a machine has, if there is one."""
        if self._disks is None:
            return None
        return next(filter(self._disks.has, (name, name.removeprefix(self._prefix))), None)

    async def _volumes(self, name: str, labels: Mapping[str, str | None]) -> Sequence[str]:
        """Return the volumes with these labels in which a machine stores something."""
        stored = await self._engine.volumes(labels)
        return [volume["Name"] for volume in stored if self._stores_in(volume["Name"]) == name]

    def _stores_in(self, volume: str) -> str | None:
        """Return the name of the machine that stores in a volume; None: it is not for that."""
        if volume.endswith(DATA):
            return volume.removesuffix(DATA)
        former = self._prefix and volume.startswith(FORMER_DATA)
        return f"{self._prefix}{volume.removeprefix(FORMER_DATA)}" if former else None

    async def differences(self, id: str, machine: Machine) -> list[str]:
        inspected = await self._engine.inspect(id)
        target = machine.storage.target if machine.storage is not None else None
        where = [mount for mount in inspected["Mounts"] if mount["Destination"] == target]
        stored = where[0]["Source" if where[0]["Type"] == "bind" else "Name"] if where else None
        body = (await self._body(machine))(stored)
        if machine.profile == "server":
            del body["Env"]  # an image adds its own
        return differences(body, inspected)

    async def start(self, id: str) -> None:
        inspected = await self._engine.inspect(id)
        state, name = inspected["State"], _name(inspected)
        if state["Paused"]:
            await self._engine.unpause(id)
        elif not state["Running"]:
            async with self._at_hand(name):
                await self._engine.start(id)

    @asynccontextmanager
    async def _at_hand(self, name: str) -> AsyncIterator[None]:
        if self._disks is not None and (disk := self._disk(name)) is not None:
            async with self._disks.at_hand(disk):
                yield
        else:
            yield

    # --- its life ---

    async def wait(self, id: str) -> Ending:
        full = id
        if len(id) != _FULL_ID:
            try:
                full = (await self.inspect(id)).id
            except NotFound:
                return Ending("engine", None, "it was removed")
        watch = self._engine.watch(full)
        try:
            ending = await asyncio.shield(watch.died)
        finally:
            watch.close()
        return replace(ending, words=one_line(await self.logs(full)))

    async def endpoint(self, id: str, port: int) -> str:
        inspected = await self._engine.inspect(id)
        if (network := _network(inspected)) == "none":
            raise WorkspaceUnavailable(
                f"{_name(inspected)} has no network, and no port {port}", phase="ready"
            )
        return (await find_reach(self._engine, network)).url(inspected, port)

    async def pause(self, id: str) -> None:
        try:
            await self._engine.pause(id)
        except NotFound:
            pass
        except WorkspaceUnavailable as exc:
            if exc.details.get("status") != 409:  # "is not running"
                raise

    async def resume(self, id: str) -> None:
        await self._engine.unpause(id)

    async def inspect(self, id: str) -> Facts:
        found = await self._engine.inspect(id)
        config = found["Config"]
        return Facts(
            id=found["Id"],
            name=_name(found),
            state=_state(found["State"]["Status"]),
            labels=config["Labels"] or {},
            image=config["Image"],
            env=dict(text.partition("=")[::2] for text in config["Env"] or ()),
            network=_network(found),
        )

    async def logs(self, id: str, lines: int = 20) -> str:
        return await self._engine.logs(id, lines)

    async def usage(self, id: str) -> Usage:
        return await self._engine.stats(id)

    async def events(self, labels: Mapping[str, str | None]) -> AsyncIterator[Found]:
        with self._engine.happenings() as queue:
            while True:
                happened = await queue.get()
                if happened is None:
                    with suppress(
                        AgentServerError
                    ):  # the stream is lost as well, and when it is back this is said again
                        for found in await self.list(labels):
                            yield found
                elif (state := _CHANGES.get(happened.what)) is not None:
                    name, about = happened.about.get("name", ""), happened.about
                    if about.get(NAME) == name and has(about, labels):
                        given = {name: text for name, text in about.items() if name.startswith(OURS)}
                        yield Found(happened.id, name, given, state)

    def follow(self, id: str, since_now: bool) -> AsyncIterator[str]:
        """Return the lines that a machine writes, as `Engine.follow_logs` does."""
        return self._engine.follow_logs(id, since_now=since_now)

    async def list(self, labels: Mapping[str, str | None]) -> list[Found]:
        containers = [
            Found(found["Id"], found["Names"][0].strip("/"), found["Labels"], _state(found["State"]))
            for found in await self._engine.containers(labels)
        ]
        stored: dict[str, Mapping[str, str]] = {
            name: volume["Labels"]
            for volume in await self._engine.volumes(labels)
            if (name := self._stores_in(volume["Name"])) is not None
        }
        given = {name: text for name, text in labels.items() if text is not None}
        if self._disks is not None and len(given) == len(labels):  # all are of whoever has this backend
            for owner in await in_thread(self._disks.owners):
                stored[f"{self._prefix}{owner.removeprefix(self._prefix)}"] = given
        for container in containers:
            stored.pop(container.name, None)
        return containers + [Found(name, name, its, "data") for name, its in stored.items()]

    # --- its end ---

    async def stop(self, id: str, *, grace: float = 0, keep_data: bool = False) -> None:
        if keep_data:
            await self._engine.stop(id, round(grace))
            return
        if grace:
            with suppress(AgentServerError):  # then it has less time
                await self._engine.stop(id, round(grace))
        name = id
        if len(id) == _FULL_ID:
            try:
                name = (await self.inspect(id)).name
            except NotFound:
                return
        await self._engine.remove(id)
        # A volume of that name that is not labelled is somebody's own.
        for volume in await self._volumes(name, {INSTANCE: None}):
            await self._engine.remove_volume(volume)
        if self._disks is not None:
            for owner in {name, name.removeprefix(self._prefix)}:
                await self._disks.remove(owner)


@asynccontextmanager
async def docker_backend(
    url: str | None = None, *, disks: Disks | None = None, prefix: str = ""
) -> AsyncIterator[DockerBackend]:
    """Reach an engine for the length of the block, wherever this process runs; disks are prepared for it.

    Args:
        url: as for an Engine.
        disks, prefix: as for a DockerBackend.

    Raises:
        EngineUnavailable: there is none, or it does not answer.
    """
    async with Engine(url) as engine:
        paths = await HostPaths.find(engine)
        if disks is not None:
            await disks.prepare(unseen=paths.unseen)
        yield DockerBackend(engine, disks=disks, paths=paths, prefix=prefix)


def _is_taken(error: BaseException) -> bool:
    return isinstance(error, WorkspaceUnavailable) and error.details.get("status") == 409


def _name(inspected: Mapping[str, Any]) -> str:
    return str(inspected["Name"]).strip("/")


def _network(inspected: Mapping[str, Any]) -> str | None:
    network = str(inspected["HostConfig"]["NetworkMode"])
    return None if network in ("default", "bridge") else network


def _state(status: str) -> State:
    return _STATES.get(status, "ended")


def _nobody(phase: str, done: int, total: int | None) -> None:
    """Nobody wants to know how far it is."""
