"""The workspaces, blocking."""

from collections.abc import Iterable, Mapping
from functools import partial
from ssl import SSLContext
from typing import TYPE_CHECKING, Literal

from agent_sdk.portal import blocking
from agent_sdk.remote.connection import HEARTBEAT_SECONDS
from agent_sdk.remote.reconnecting import OnConnection
from agent_sdk.sync import LocalWorkspace, RemoteWorkspace, Workspace
from workspaces.api import APIRemoteWorkspace as AsyncAPIRemoteWorkspace
from workspaces.docker import DockerWorkspace as AsyncDockerWorkspace

if TYPE_CHECKING:
    from workspaces.backend.docker.server_container import OnLog, OnProgress

__all__ = ["APIRemoteWorkspace", "DockerWorkspace", "LocalWorkspace", "RemoteWorkspace"]


class APIRemoteWorkspace(Workspace):
    """Blocking twin of APIRemoteWorkspace."""

    asynchronous: AsyncAPIRemoteWorkspace

    def __init__(
        self,
        runtime_api_url: str,
        runtime_api_key: str,
        server_image: str,
        *,
        ssl: SSLContext | None = None,
        session_id: str | None = None,
        resource_factor: int = 1,
        runtime_class: str | None = None,
        image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent",
        env: Mapping[str, str] | None = None,
        forward_env: Iterable[str] = (),
        keep_alive: bool = False,
        pause_on_close: bool = False,
        startup_timeout: float = 300.0,
        connect_timeout: float = 30.0,
        api_timeout: float = 60.0,
        working_dir: str | None = None,
        conversation: str | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        on_connection: OnConnection | None = None,
        on_progress: "OnProgress | None" = None,
    ) -> None:
        """See workspaces.api.APIRemoteWorkspace."""
        super().__init__(
            AsyncAPIRemoteWorkspace(
                runtime_api_url,
                runtime_api_key,
                server_image,
                ssl=ssl,
                session_id=session_id,
                resource_factor=resource_factor,
                runtime_class=runtime_class,
                image_pull_policy=image_pull_policy,
                env=env,
                forward_env=forward_env,
                keep_alive=keep_alive,
                pause_on_close=pause_on_close,
                startup_timeout=startup_timeout,
                connect_timeout=connect_timeout,
                api_timeout=api_timeout,
                working_dir=working_dir,
                conversation=conversation,
                heartbeat=heartbeat,
                on_connection=on_connection and partial(self._pass_on, on_connection),
                on_progress=on_progress and partial(self._pass_on, on_progress),
            )
        )

    @property
    def session_id(self) -> str:
        """See workspaces.api.APIRemoteWorkspace.session_id."""
        return self.asynchronous.session_id

    @property
    def runtime_id(self) -> str | None:
        """See workspaces.api.APIRemoteWorkspace.runtime_id."""
        return self.asynchronous.runtime_id

    pause = blocking(AsyncAPIRemoteWorkspace.pause)
    resume = blocking(AsyncAPIRemoteWorkspace.resume)


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

    port_url = blocking(AsyncDockerWorkspace.port_url)
    pause = blocking(AsyncDockerWorkspace.pause)
    resume = blocking(AsyncDockerWorkspace.resume)
