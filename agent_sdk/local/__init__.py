"""Here: workspaces and conversations of this machine and process.

conversation:  a conversation whose agent runs in this process
opened:        what exists of it between its first use and its end
configuration: which agent it has, and its secrets
settings:      its agent beside the log, secrets sealed
receipts:      what the sender of a message gets, once and again
turns:         which turn runs, and which answers a message
journal:       its part of the log, and who follows it
fold:          what follows from its log: state, stats, title
repair:        the end of a turn whose process ended in the middle
delivery:      events on their way to callbacks
follower:      reading a log and going on with what comes
log:           the event log, one SQLite file for many conversations
clerk:         the thread that owns a database and commits in groups
database:     the rows of conversations and events, with what proves that they are what was written
operations:   the rows of operations, and for how long they are kept
chain:        what proves that rows are what was written
formats:      the tables of a log's file
storage:      one connection to an SQLite file
recovery:     opening a log that may be damaged
salvage:      what is whole in a damaged file
wal:          what the WAL tells before it is opened
reserve:      room for the moment when there is none
sealed:       secrets at rest

workspace:    a workspace on this machine
environment:  what a command finds in its environment
arguments:    limits on what callers ask for
launch:       starting a program
children:     started programs, and their ends
process_tree: all processes of an operation, found and ended
rights:       the rights of another user, for a block
users:        as whom a command runs
processes:    the processes of a workspace
repeats:      calls that are carried out once, however often they come
running:      a process with its streams
process:      a process as its users see it
intake:       bytes from a process
feed:         bytes into a process
last_words:   when the output of a command is whole
spool:        what a process said, by offset
herald:       telling a caller what a process says
terminal:     pseudo terminals
paths:        paths that cannot leave the root
files:        files of a workspace
uploads:      files that come in parts, over connections that are lost
entries:      what can be done with one of them; blocks
bash:         one bash in a terminal, driven over pipes of its own
shell:        persistent shells
git:          the repository of a workspace, and git_configuration, how git is to read it
"""
