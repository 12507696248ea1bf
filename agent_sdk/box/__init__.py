"""The box: a process that serves one workspace on a Unix socket and outlives every connection.

`python -m agent_sdk.box` runs one. Knows how a process gives up rights; nothing of agents and servers.

__main__: `python -m agent_sdk.box`
process:  a box: LocalWorkspace behind a Unix socket
service:  what serves its connections
seccomp:  a filter of system calls for a box
profile:  what is in force for a box
capabilities: what the box of a task keeps of root
"""
