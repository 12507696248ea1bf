"""There: the contracts over a connection.

connection:   reach a server or a box and authenticate
link:         a connection that may be lost and found again
workspace:    commands, and files up and down
process:      processes and shells
files:        files and git
streams:      bytes that belong to a call
conversation: the verbs as calls
delivery:     events on their way to callbacks
"""
