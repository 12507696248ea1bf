"""Thinking: from a user's message to the end of a turn. Knows the Workspace contract and no place in particular.

loop:     one turn, from start to end
ending:   how an answer of the model ended, and what the turn does then
calls:    the tool calls of a turn: order, approvals, results
actor:    an agent at work: model client, tools, secrets, and which calls wait for somebody
place:    where its tools act, and whether that is the same place as before
turn_state: whether a turn is open, how far it came, what may follow, and what a turn needs of its log
history:  what the model is shown of the log
toolbox:  the tools of a conversation
mask:     secrets out of logs, streams and results
clip:     long text, cut in its middle
tools:    the built-in tools
llm:      reaching models
middleware: the features of an agent, one file each
"""
