"""The command line: `agent-server` and what a person sees.

A client like any other. Each command is imported when it is used.

main:          from the words of a command line to its command
arguments:     the arguments of all commands
client:        servers and workspaces to use
terminal:      standard input and output, text for people
transcript:    events as text, shown as they come
events:        run, events, attach
workspace:     exec, cp
conversations: ls, rm, prune
server:        serve, health, config, backup
doctor:        what works on this machine
"""
