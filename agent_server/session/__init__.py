"""One WebSocket or SSE stream: handshake, calls, events replayed and then live.

Knows the network and the conversations; it is where they meet.

session:      a WebSocket, and all of them
handshake:    `initialize`
subscription: replay, then live
methods:      method class to coroutine, and the dispatcher around all of them
event_stream: events as Server-Sent Events
"""
