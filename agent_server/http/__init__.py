"""HTTP: connections, keys and rules for whoever comes from the network.

Knows nothing of conversations; what is at which address stands in `agent_server.routes`.

connection: one network connection
websocket:  the WebSocket handshake, and frames before they are parsed
security:   Host, Origin, key; errors
auth:       who may, and how often one may be wrong
errors:     JSON over HTTP
query:      what may follow the `?` of an address
"""
