"""A workspace on this machine: commands, terminals, files, git; and the contract of every workspace.

Knows the operating system and no agent. Only `service` knows the wire: it answers calls with a workspace.

local:             LocalWorkspace, a workspace on this machine
process:           a process as its callers see it
child_process:     a started process, its streams and its end
process_table:     the processes of a workspace
pipes:             the pipes and terminals of a process, and when its output is whole
launch:            starting a program
process_tree:      all processes of an operation, found and ended
spool:             what a process said, by offset
bash:              one bash in a terminal, driven over pipes of its own
shell:             persistent shells
paths:             paths that cannot leave the root
files:             files of a workspace, and uploads in parts
git:               the repository of a workspace
environment:       what a command is given: its arguments and its environment
users:             as whom a command runs, and the rights of another user for a block
contract:          the contract of a Workspace
output:            what commands and shells have said
disk:              files of this machine as streams
atomic_file:       files that are replaced as a whole
folders:           whole folders as streams
verbs:             verbs as methods of the protocol
service:           a Workspace behind a Peer
limits:            limits and rights that the kernel sets, and what ran into one
"""
