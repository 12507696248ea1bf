"""Places to work, and starting them.

box_process: a box as a child process of a server
disks:       the workspaces of sandboxes, with a limit where this machine can make one
engine:      the container engine: containers made, run, watched and removed; what it is made of:
             engine_api, its calls; engine_events, what happens to containers; engine_failure, what went
             wrong and the mend; engine_info and engine_logs, what it says of itself and of them
host_paths:  what the engine calls the folders of a server that is in a container itself
labels:      how containers, networks and volumes of ours are known
programs:    programs of this machine that a server runs for itself
snapshots:   copies of the workspaces of sandboxes
sweep:       removes what nobody owns any more
sync:        the same workspaces, blocking
"""

from agent_sdk import LocalWorkspace, RemoteWorkspace, Sandbox

__all__ = ["LocalWorkspace", "RemoteWorkspace", "Sandbox"]
