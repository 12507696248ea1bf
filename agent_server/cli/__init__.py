"""The command line: `agent-server` and what a person sees.

A client like any other. Each command is imported when it is used.

main:         from the words of a command line to its command
arguments:    the arguments of all commands
client:       servers to use
workspace:    workspaces to use
terminal:     text for a terminal
stdio:        standard input and output
viewer:       events, shown as they come
transcript:   events as text
engine_check: what doctor looks at in an engine
commands:     one file per command
"""
