"""The event log: one SQLite file for many conversations. Whatever is acknowledged is on the disk.

Knows rows, hashes, commits and damaged files; nothing of agents, conversations or networks.

event_log:  the event log, one SQLite file for many conversations
thread:     the thread that owns a database and commits in groups
database:   the rows of conversations and events, with what proves that they are what was written
storage:    one connection to an SQLite file, and room for the moment when there is none
operations: the rows of operations, and for how long they are kept
chain:      what proves that rows are what was written
formats:    the tables of a log's file
recovery:   opening a log that may be damaged, and what its WAL tells before that
"""
