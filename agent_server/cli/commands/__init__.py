"""What the commands of `agent-server` do, one file each; `main` returns the exit code.

serve:  run the server
run:    one conversation to its end
exec:   a command in a workspace
cp:     a file or a folder into or out of a workspace
ls:     the conversations of a server
rm:     conversations, removed
prune:  those that nobody has used for long, removed
events: the events of a conversation
attach: watch a conversation and talk to it
doctor: what works on this machine
health: whether a server answers
config: every option of a server, and where it was set
backup: a copy of a data folder

Each is imported when it is used.
"""
