"""Servers for others, started on request: the Runtime API.

Knows backends, keys and quotas; nothing of conversations.

service:        the Runtime API, as a whole
routes:         what is at which address
tenants:        who may have what
runtimes:       all runtimes
runtime:        one runtime: started, paused, ended
pods:           what runtimes run in
pods_docker:    containers
pods_process:   processes, without an engine
proxy:          the way to a runtime
tunnel:         two connections joined
server_process: an agent server as a child process
"""
