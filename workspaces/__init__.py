"""Places to work, and starting them.

docker:  DockerWorkspace, a server in a container that is started for one client
started: a workspace on a server that is started for it, on a machine of any backend
api:     APIRemoteWorkspace, a server that a Runtime API starts
runtime_client: the calls of a Runtime API
server:  an agent server on a machine of any backend
sync:    the same workspaces, blocking
backend: where things are run: the container engine, processes
box:     boxes and what confines them: process, other user, sandbox

Names are imported at their first use, so that `import workspaces` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_sdk import LocalWorkspace, RemoteWorkspace, Sandbox
    from workspaces.api import APIRemoteWorkspace
    from workspaces.docker import DockerWorkspace

__all__ = ["APIRemoteWorkspace", "DockerWorkspace", "LocalWorkspace", "RemoteWorkspace", "Sandbox"]

_HOME = {
    "APIRemoteWorkspace": "workspaces.api",
    "DockerWorkspace": "workspaces.docker",
    "LocalWorkspace": "agent_sdk",
    "RemoteWorkspace": "agent_sdk",
    "Sandbox": "agent_sdk",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
