"""Places to work, and starting them.

box_process: a box as a child process of a server
engine:      the container engine of this machine
sync:        the same workspaces, blocking
"""

from agent_sdk import LocalWorkspace, RemoteWorkspace, Sandbox

__all__ = ["LocalWorkspace", "RemoteWorkspace", "Sandbox"]
