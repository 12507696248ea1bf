"""Servers for others, started on request: the Runtime API.

Knows keys, quotas and what any backend promises; nothing of conversations.

service:  the Runtime API as a whole: who may use it, and what is at which address
runtimes: all runtimes
runtime:  one runtime: started, paused, ended
record:   what a tenant may have, what is asked for in a runtime, what is kept of it, and the machine it runs in
proxy:    the way to a runtime
"""
