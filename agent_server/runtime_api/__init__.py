"""Servers for others, started on request: the Runtime API.

Knows keys, quotas and what any backend promises; nothing of conversations.

service:  the Runtime API, as a whole
routes:   what is at which address
tenants:  who may have what
runtimes: all runtimes
runtime:  one runtime: started, paused, ended
record:   what is asked for in a runtime, what is kept of it, and the machine it runs in
proxy:    the way to a runtime
"""
