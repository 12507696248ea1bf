"""HTTP: connections, keys and rules for whoever comes from the network.

Knows nothing of conversations; what is at which address stands in `agent_server.routes`.

connection: one network connection
frames:     WebSocket frames, before they are parsed
upgrade:    the WebSocket handshake
security:   Host, Origin, key; errors
auth:       the API keys
errors:     JSON over HTTP
query:      what may follow the `?` of an address
"""
