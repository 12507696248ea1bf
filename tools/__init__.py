"""What prints the references in `docs/` from the code. None of it is in the packages.

documents:     the files that `make docs` writes
docstrings:    what docstrings say, in parts
markdown:      tables, types and links
protocol:      docs/protocol.md, from the message classes
openrpc:       agent_server/openrpc.json, from the message classes
http:          docs/http.md, from the routes
configuration: docs/configuration.md, from the table of options
sdk:           docs/sdk.md, from signatures and docstrings
"""
