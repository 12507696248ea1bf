"""There: the contracts over a connection.

connection:   reach a server or a box and authenticate
address:      URL and key of a server, checked
server:       the conversations of a server, listed and removed
refusal:      why a server, or somebody in its place, lets nobody in
link:         a connection that may be lost and found again
reconnecting: a client's link to its server
verbs:        verbs of the contract as calls
workspace:    commands, and files up and down
process:      commands, processes and shells
files:        files on their way, and git
streams:      a call with its bytes
conversation: the verbs as calls
delivery:     events on their way to callbacks
tool_calls:   tools that run here, called from there
"""
