"""Containers: the engine, images, what containers are to be, and how they are reached.

The only room that speaks to a container engine.

backend:           machines that are containers
engine:            containers made, run, watched and removed
engine_connection: how the engine is called, and what its failures mean
engine_streams:    what happens to containers, and what they write
engine_info:       what the engine says of itself, and which of its runtimes a sandbox can have
images:            images, looked at and pulled, and files of what has not run
profiles:          what containers with a box or a server are to the engine, and whether they are that
reach:             how this process and containers find each other: addresses, networks, folders
reaper:            the process that removes the container of a client that was killed
"""
