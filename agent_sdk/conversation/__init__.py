"""A conversation whose agent runs in this process, and the contract of every conversation.

Joins a log, an agent and a workspace. Knows no wire: what is the same there stands in `contract` alone.

local:         LocalConversation, whose agent runs in this process
opened:        what exists of it between its first use and its end
configuration: which agent it has, and its secrets
settings:      its agent beside the log, secrets sealed
sealed:        secrets at rest
receipts:      what the sender of a message gets, once and again
turns:         which turn runs, and which answers a message
journal:       its part of the log, and who follows it
state:         what follows from its log: state, stats, title
delivery:      events on their way to callbacks
follower:      reading a log and going on with what comes
contract:      the contract of a Conversation
"""
