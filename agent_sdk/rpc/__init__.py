"""The protocol, moving. Import from the files; this one imports nothing, so that a box needs no aiohttp.

pipe:      what moves frames; a pair in memory
unix:      frames over a Unix socket
websocket: frames over an aiohttp WebSocket
lanes:     what waits to be sent, and who goes next
stream:    byte streams, and which of them a connection has
calls:     calls both ways: ours that wait for an answer, and those of the other end
peer:      one end of a connection: calls both ways, notices, events, streams
budget:    memory for what arrives in pieces
"""
