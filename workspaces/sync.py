"""The workspaces, blocking."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from agent_sdk.remote.connection import HEARTBEAT_SECONDS
from agent_sdk.remote.reconnecting import OnConnection
from agent_sdk.sync import LocalWorkspace, RemoteWorkspace, Workspace
from workspaces.docker import DockerWorkspace as AsyncDockerWorkspace

if TYPE_CHECKING:
    from workspaces.server_container import OnLog, OnProgress

__all__ = ["DockerWorkspace", "LocalWorkspace", "RemoteWorkspace"]


class DockerWorkspace(Workspace):
    """Blocking twin of DockerWorkspace."""

    asynchronous: AsyncDockerWorkspace

    def __init__(
        self,
        server_image: str = "agent-server:latest",
        *,
        host_port: int | None = None,
        volumes: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        forward_env: Iterable[str] = (),
        network: str | None = None,
        platform: str | None = None,
        gpus: str | None = None,
        memory: str | None = None,
        cpus: float | None = None,
        pids: int | None = None,
        ports: Iterable[int] = (),
        name: str | None = None,
        keep: bool = False,
        pull: Literal["missing", "always", "never"] = "missing",
        startup_timeout: float = 120.0,
        docker_url: str | None = None,
        working_dir: str | None = None,
        conversation: str | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        on_connection: OnConnection | None = None,
        on_progress: "OnProgress | None" = None,
        on_log: "OnLog | None" = None,
    ) -> None:
        """See workspaces.docker.DockerWorkspace."""
        super().__init__(
            AsyncDockerWorkspace(
                server_image,
                host_port=host_port,
                volumes=volumes,
                env=env,
                forward_env=forward_env,
                network=network,
                platform=platform,
                gpus=gpus,
                memory=memory,
                cpus=cpus,
                pids=pids,
                ports=ports,
                name=name,
                keep=keep,
                pull=pull,
                startup_timeout=startup_timeout,
                docker_url=docker_url,
                working_dir=working_dir,
                conversation=conversation,
                heartbeat=heartbeat,
                on_connection=on_connection and partial(self._pass_on, on_connection),
                on_progress=on_progress and partial(self._pass_on, on_progress),
                on_log=on_log and partial(self._pass_on, on_log),
            )
        )

    @property
    def container(self) -> str | None:
        """See workspaces.docker.DockerWorkspace.container."""
        return self.asynchronous.container

    def port_url(self, port: int) -> str:
        """See workspaces.docker.DockerWorkspace.port_url."""
        return self._caller.call(lambda: self.asynchronous.port_url(port))

    def pause(self) -> None:
        """See workspaces.docker.DockerWorkspace.pause."""
        self._caller.call(self.asynchronous.pause)

    def resume(self) -> None:
        """See workspaces.docker.DockerWorkspace.resume."""
        self._caller.call(self.asynchronous.resume)

    def _pass_on(self, told: Any, *arguments: Any) -> None:
        self._caller.post(told, *arguments)
