"""The process: an agent server, and the command that starts and uses one.

serve:         start and end, in order
app:           the HTTP server: what is at which address
work:          what runs now; draining
data_folder:   where things last, and its lock
keys:          keys of clients, and keys that encrypt secrets
logs:          log lines without secrets
metrics:       numbers for Prometheus
config:        every option, and where it is set
http:          connections, security, errors
session:       one WebSocket or stream of events
conversations: all conversations of the server
boxes:         the way to their boxes
runtime_api:   servers for others, started on request
cli:           the command line
__main__:      `python -m agent_server`
"""
