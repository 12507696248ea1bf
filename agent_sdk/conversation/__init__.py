"""A conversation whose agent runs in this process, and the contract of every conversation.

Joins a log, an agent and a workspace. Knows no wire: what is the same there stands in `contract` alone.

local:         LocalConversation, whose agent runs in this process
configuration: which agent it has, and its secrets
store:         its agent at rest, beside the log, secrets encrypted
turns:         which turn runs, and which answers a message
log:           its part of the log, what follows from it (state, stats, title), who follows it, what calls are known by
dispatch:      events on their way to callbacks
contract:      the contract of a Conversation
"""
