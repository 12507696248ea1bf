"""The command line: `agent-server` and what a person sees.

A client like any other. Each command is imported when it is used.

main:          what can be typed, and what is done then
client:        servers and workspaces to use
terminal:      standard input and output, text for people
transcript:    events as text, shown as they come
workspace:     exec, cp
conversations: run, events, attach, ls, rm, prune
server:        serve, health, config, backup
doctor:        what works on this machine
"""
