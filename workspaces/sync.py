"""The workspaces, blocking."""

from agent_sdk.sync import LocalWorkspace, RemoteWorkspace

__all__ = ["LocalWorkspace", "RemoteWorkspace"]
