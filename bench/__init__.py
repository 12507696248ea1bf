"""Measurements, each beside its physical limit in the same run: `make bench`.

measure:   percentiles, memory of a process, one row of the table
server:    a real server as a child process
startup:   import, server start
commands:  execute, shell, beside a bare subprocess
transfer:  files up and down, beside a plain copy
events:    events from server to client, durable appends, replay
log:       the event log when it is long
steps:     overhead of an agent's step
readers:   many subscribers, a long replay, slow ones beside healthy ones
many:      thousands of idle conversations, a restart with a thousand
crowd:     many clients in one process
audience:  a crowd as a child process, and somebody who makes events for it
house:     how large the code is, and what a call crosses
counted:   a process whose calls are counted
"""
