"""Boxes and what confines them: as a process, as another user, in a sandbox.

`contract` is what a server asks of each. Knows engines as a `Backend`; nothing of conversations.

contract:    the contract of a box
process:     a box as a child process of a server
container:   a box in a sandbox: on a machine of a backend
folder:      what of such a box is on this machine
machine:     what that machine is to be, who is who in it, and whether it is what was asked for
runtime:     what a box needs to run in any image, made once
confinement: how a box on this machine is kept apart
host:        what the sandboxes of a server share
sandboxes:   the sandboxes of a server, and those that wait for an owner
"""
