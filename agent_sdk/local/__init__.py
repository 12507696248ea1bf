"""Here: workspaces and conversations of this machine and process.

log           the event log, one SQLite file for many conversations
clerk         the thread that owns a database and commits in groups
database      tables and statements, the only code that speaks to apsw
"""
