"""The features of an agent, one file each. The loop knows none of them; they know the contract, `agent_sdk.middleware`.

chain:           which middleware an agent has, called in order; kinds by name
iteration_limit: how many model calls a turn may make
tool_output:     how much of a result goes into the log
approval:        which calls wait for somebody
prompt:          how the agent works, where it is, what its user added
retries:         asking a model again after failures
"""
