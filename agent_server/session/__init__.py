"""One WebSocket or SSE stream: handshake, calls, events replayed and then live.

Knows the network and the conversations; it is where they meet.

session:      a WebSocket, and all of them
methods:      `initialize`; method class to coroutine, and the dispatcher around all of them
subscription: replay, then live; and events as Server-Sent Events
"""
