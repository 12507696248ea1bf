"""The command line: `agent-server` and what a person sees.

A client like any other. Each command is imported when it is used.

main:         from the words of a command line to its command
arguments:    the arguments of all commands
client:       servers to use
places:       workspaces to use
terminal:     text for a terminal
outlet:       standard output
inlet:        standard input
viewer:       events, shown as they come
transcript:   events as text
check:        one thing that doctor looks at
engine_check: what doctor looks at in an engine
commands:     one file per command
"""
