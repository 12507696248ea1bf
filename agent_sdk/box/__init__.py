"""The box: a process that serves one workspace on a Unix socket and outlives every connection.

`python -m agent_sdk.box` runs one. Knows how a process gives up rights; nothing of agents and servers.

__main__: `python -m agent_sdk.box`
process:  a box: LocalWorkspace behind a Unix socket, and what serves its connections
seccomp:  what a box gives up: system calls, and what root may do
"""
