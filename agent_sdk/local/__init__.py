"""Here: workspaces and conversations of this machine and process.

conversation:  a conversation whose agent runs in this process
configuration: which agent it has, and its secrets
turns:         which turn runs, and which answers a message
journal:       its part of the log, and who follows it
fold:          what follows from its log: state, stats, title
repair:        the end of a turn whose process ended in the middle
delivery:      events on their way to callbacks
follower:      reading a log and going on with what comes
log:           the event log, one SQLite file for many conversations
clerk:         the thread that owns a database and commits in groups
database:      tables and statements, the only code that speaks to apsw
"""
