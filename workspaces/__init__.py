"""Places to work, and starting them.

box_process: a box as a child process of a server
disks:       the workspaces of sandboxes, with a limit where this machine can make one
engine:      the container engine of this machine
programs:    programs of this machine that a server runs for itself
snapshots:   copies of the workspaces of sandboxes
sync:        the same workspaces, blocking
"""

from agent_sdk import LocalWorkspace, RemoteWorkspace, Sandbox

__all__ = ["LocalWorkspace", "RemoteWorkspace", "Sandbox"]
