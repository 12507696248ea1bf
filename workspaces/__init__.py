"""Places to work, and starting them.

accounts:    users and groups of an image, with the one of commands
box_process: a box as a child process of a server
box_runtime: what a box needs to run in any image, made once
box_docker:  a box in a hardened container; box_folder, what of it is on this machine; container_body, what it is to
             the engine; box_parts, what it is put together from; verification, whether it is that; box_ending, why
             it is no more
child:       a process that may outlive whoever started it
confinement: how a box on this machine is kept apart
disks:       the workspaces of sandboxes, with a limit where this machine can make one
mounts:      what of this machine is mounted into sandboxes, and whether it is still that
docker:      DockerWorkspace, a server in a container that is started for one client; with
             reaper, the process that removes the container of a client that was killed, owner, whether a
             client still lives, and server_log, the server's lines in the client's log
engine:      the container engine: containers made, run, watched and removed; what it is made of:
             engine_api, its calls; engine_events, what happens to containers; engine_failure, what went
             wrong and the mend; engine_info, engine_logs and engine_lines, what it says of itself and of them;
             engine_runtimes, which of its runtimes a sandbox can have; engine_archive, files of containers;
             docker_config, what the `docker` command keeps for its user
host_paths:  what the engine calls the folders of a server that is in a container itself
images:      images, looked at and pulled
labels:      how containers, networks and volumes of ours are known
own_container: the container that this process runs in
pool:        boxes that run already and wait for an owner
programs:    programs of this machine that a server runs for itself
reach:       over which address what listens in a container is reached
server_container: a container with a server in it, for whoever starts one; server_spec, what it is to be
sizes:       sizes as people write them
snapshots:   copies of the workspaces of sandboxes
runtime_api: APIRemoteWorkspace, a server that a Runtime API starts; runtime_client, the calls of one
sandboxes:   what the sandboxes of a server share; site, how each of them sees it
server_process: an agent server as a child process
sweep:       removes what nobody owns any more
their_files: folders that belong to the user of sandboxes
sync:        the same workspaces, blocking

Names are imported at their first use, so that `import workspaces` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_sdk import LocalWorkspace, RemoteWorkspace, Sandbox
    from workspaces.docker import DockerWorkspace
    from workspaces.runtime_api import APIRemoteWorkspace

__all__ = ["APIRemoteWorkspace", "DockerWorkspace", "LocalWorkspace", "RemoteWorkspace", "Sandbox"]

_HOME = {
    "APIRemoteWorkspace": "workspaces.runtime_api",
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
