"""Containers: the engine, images, what containers are to be, and how they are reached.

The only room that speaks to a container engine.

engine:           containers made, run, watched and removed
engine_api:       the engine's calls
engine_archive:   files of containers
engine_events:    what happens to containers
engine_failure:   what went wrong, and the mend
engine_info:      what the engine says of itself
engine_lines:     lines of JSON in a stream
engine_logs:      what it says of containers
engine_runtimes:  which of its runtimes a sandbox can have
images:           images, looked at and pulled
container_body:   what a container with a box is to the engine
docker_config:    what the `docker` command keeps for its user
host_paths:       what the engine calls the folders of a server that is in a container itself
labels:           how containers, networks and volumes of ours are known
mounts:           what of this machine is mounted into sandboxes, and whether it is still that
own_container:    the container that this process runs in
reach:            over which address what listens in a container is reached
reaper:           the process that removes the container of a client that was killed
owner:            whether a client still lives
server_container: a container with a server in it
server_spec:      what such a container is to be
server_log:       the server's lines in the client's log
accounts:         users and groups of an image, with the one of commands
"""
