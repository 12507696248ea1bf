"""There: the contracts over a connection.

connection:   reach a server or a box and authenticate, or say why not
server:       the conversations of a server, listed and removed
link:         a connection that may be lost and found again, and verbs as calls over it
reconnecting: a client's link to its server
workspace:    commands, and files up and down
process:      commands, processes and shells
files:        files on their way, and git
streams:      a call with its bytes
conversation: the verbs as calls
delivery:     events on their way to callbacks; tools that run here, called from there
"""
