"""HTTP: connections, keys and rules for whoever comes from the network.

Knows nothing of conversations; what is at which address stands in `agent_server.app`.

connection: one network connection: whom it is from, and its frames before they are parsed
security:   Host, Origin, key; how often one may be wrong; errors
errors:     JSON over HTTP
request:    what a request says: its query, its body, its upgrade to a WebSocket
"""
