"""Boxes and what confines them: as a process, as another user, in a sandbox.

`contract` is what a server asks of each. Knows engines through `backend`; nothing of conversations.

contract:      the contract of a box
process:       a box as a child process of a server
container:     a box in a hardened container
folder:        what of such a box is on this machine
parts:         what a box in a container is put together from
runtime:       what a box needs to run in any image, made once
confinement:   how a box on this machine is kept apart
sandboxes:     what the sandboxes of a server share
site:          how each sandbox sees what they share
pool:          boxes that run already and wait for an owner
verification:  whether a container is what was asked for, and why it is no more
disks:         the workspaces of sandboxes, with a limit where this machine can make one
snapshots:     copies of the workspaces of sandboxes
sandbox_files: folders that belong to the user of sandboxes, and the programs that handle them
"""
