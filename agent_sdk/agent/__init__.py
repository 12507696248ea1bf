"""Thinking: from a user's message to the end of a turn. Knows the Workspace contract and no place in particular.

loop:     one turn, from start to end
calls:    the tool calls of a turn: order, approvals, results
runtime:  an agent at work: model client, tools, secrets, and where its tools act
turn_state: whether a turn is open, how far it came, what may follow, and what a turn needs of its log
history:  what the model is shown of the log, how its answers ended, and what the turn does then
toolbox:  the tools of a conversation by name; think, finish and task_tracker, which act on nothing
mask:     secrets out of logs, streams and results
tools:    the built-in tools that act on a workspace
llm:      reaching models
middleware: the features of an agent, one file each
"""
