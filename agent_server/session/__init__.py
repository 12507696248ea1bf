"""One WebSocket or SSE stream: handshake, calls, events replayed and then live.

Knows the network and the conversations; it is where they meet.

lobby:        what all WebSockets share
session:      one WebSocket
introduction: `initialize`
feed:         replay, then live
handlers:     method class to coroutine
event_stream: events as Server-Sent Events
"""
