"""The workspaces, blocking."""

from agent_sdk.portal import blocking, constructed, fact
from agent_sdk.sync import LocalWorkspace, RemoteWorkspace, Workspace
from workspaces.api import APIRemoteWorkspace as AsyncAPIRemoteWorkspace
from workspaces.docker import DockerWorkspace as AsyncDockerWorkspace

__all__ = ["APIRemoteWorkspace", "DockerWorkspace", "LocalWorkspace", "RemoteWorkspace"]


class APIRemoteWorkspace(Workspace):
    """Blocking twin of APIRemoteWorkspace."""

    asynchronous: AsyncAPIRemoteWorkspace

    @constructed(AsyncAPIRemoteWorkspace)
    def __init__(self, workspace: AsyncAPIRemoteWorkspace) -> None:
        super().__init__(workspace)

    @property
    def session_id(self) -> str:
        """Give it to another workspace, and that one attaches to the same runtime."""
        return self.asynchronous.session_id

    runtime_id = fact(AsyncAPIRemoteWorkspace.runtime_id)
    pause = blocking(AsyncAPIRemoteWorkspace.pause)
    resume = blocking(AsyncAPIRemoteWorkspace.resume)


class DockerWorkspace(Workspace):
    """Blocking twin of DockerWorkspace."""

    @constructed(AsyncDockerWorkspace)
    def __init__(self, workspace: AsyncDockerWorkspace) -> None:
        super().__init__(workspace)

    container = fact(AsyncDockerWorkspace.container)
    port_url = blocking(AsyncDockerWorkspace.port_url)
    pause = blocking(AsyncDockerWorkspace.pause)
    resume = blocking(AsyncDockerWorkspace.resume)
