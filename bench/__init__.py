"""Measurements, each beside its physical limit in the same run: `make bench`.

measure:   percentiles, memory of a process, one row of the table
server:    a real server as a child process
startup:   import, server start
commands:  execute, shell, beside a bare subprocess
transfer:  files up and down, beside a plain copy
events:    events from server to client, durable appends, replay
steps:     overhead of an agent's step
"""
